"""Checks for the exercises, one module a lesson.

Notebooks call them, in the parent. A check runs the learner's answer on real ranks, over awkward
cases, and says what it saw.
"""
