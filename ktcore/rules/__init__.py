"""The rule engine: rule files, their resolution into a plan, and the trace that explains it."""
