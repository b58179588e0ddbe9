"""Rules about a configuration as a whole: one rule = one pure function, one module per topic."""
