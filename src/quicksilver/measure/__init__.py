"""Measuring: perplexity on windows, cost from traces, paired statistics, rows of a report."""
