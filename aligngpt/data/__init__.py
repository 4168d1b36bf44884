"""Sources of samples, one module each: a source is a function that returns `Sample`s."""
