"""The matrix: backends by operators by formats, from committed reports, as Markdown and as one HTML file."""

from ktcore.conformance.render.html import render_html
from ktcore.conformance.render.markdown import render_markdown
from ktcore.conformance.render.matrix import Cell, Column, Evidence, Matrix, build_matrix, load_evidence

__all__ = ["Cell", "Column", "Evidence", "Matrix", "build_matrix", "load_evidence", "render_html", "render_markdown"]
