"""Comparison of runs: a table for the terminal and a self-contained HTML page."""

from g2r_megatron.report.page import write_report
from g2r_megatron.report.summary import summary_table

__all__ = ["summary_table", "write_report"]
