"""Comparison of runs: a table for the terminal, an HTML page in one file, and the page's figures as files."""

from g2r_megatron.report.export import write_figures
from g2r_megatron.report.page import write_report
from g2r_megatron.report.summary import summary_table

__all__ = ["summary_table", "write_figures", "write_report"]
