"""Checks for the exercises, one module a lesson.

A check runs the learner's answer on real ranks, over awkward cases, and says what it saw.
"""
