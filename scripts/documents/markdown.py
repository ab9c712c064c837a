"""Markdown that scripts write."""


def table(*rows: tuple) -> str:
    """The first row is the head."""
    head, *body = (f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
