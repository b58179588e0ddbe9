"""Rollouts from SGLang servers."""
