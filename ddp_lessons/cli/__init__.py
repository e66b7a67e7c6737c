"""The command `ddp-lessons`."""

from ddp_lessons.cli.command import main as main
