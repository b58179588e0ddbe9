"""The composition root: from the configuration to the objects that a run consists of."""
