"""Values that are written as text: on a command line, or in quotes by mistake."""

import ast


def literal(text: str) -> object:
    """Return the value of a Python literal, or of dict(key=value) as in a config file; else the text itself."""
    try:
        return ast.literal_eval(_DictCalls().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


class _DictCalls(ast.NodeTransformer):
    """Replaces dict(key=value) by {"key": value}."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict") or node.args or None in names:
            return node
        keys: list[ast.expr | None] = [ast.Constant(name) for name in names]
        return ast.Dict(keys, [keyword.value for keyword in node.keywords])
