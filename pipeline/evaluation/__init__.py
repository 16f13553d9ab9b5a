"""Metrics, throughput and the report."""
