"""Explorers: sliders in front, real ranks behind. One a lesson; explorer.py is their common part.

Run in the parent; ipywidgets is imported here and nowhere else.
"""
