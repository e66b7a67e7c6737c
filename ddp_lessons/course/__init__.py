"""The course as files: which lessons there are, what they ask, and what a learner has done."""
