"""The measurements behind `pbs-attn bench`: all contestants of a row run in one process, in
turn."""
