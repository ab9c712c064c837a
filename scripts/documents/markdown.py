"""Formats the Markdown that scripts write."""


def table(*rows: tuple) -> str:
    """Returns a table whose head is the first row."""
    head, *body = (f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
