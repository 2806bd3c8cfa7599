"""Measurements behind `pbs-attn bench`: every contestant of a row runs in one process, in turn."""
