"""Explorers: sliders that launch real ranks, one a lesson. explorer.py is their common part.

Notebooks call them, in the parent; the package imports ipywidgets nowhere else.
"""
