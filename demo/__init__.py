"""`make demo`: from synthetic scenes to answers, through the commands of a real run."""
