"""One runnable benchmark per goal, each with its peer beside it in the same run."""
