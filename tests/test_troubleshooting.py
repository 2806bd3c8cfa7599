"""docs/troubleshooting.md has every message that the sources can raise, and no other;
docs/transformers.md every reason that explain() can give, and docs/serving.md every reason that the
vLLM plugin can.

The tests compare templates. A variable part is `…` here, and `<anything>` in the documents, where
the first cells of tables with the header `message`, `status` or `reason` count.
"""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIES = "…"
PASSED_ON = "str(error)"  # the message of a caught error, which the page lists by itself


def place(path, line):
    return f"{path.relative_to(ROOT)}:{line}"


# Python


def python_templates(node, scope):
    """Every string that an expression can be, with VARIES for the parts that only a run shows."""
    match node:
        case ast.Constant(value=str(text)):
            return [re.sub(r"\{[\w.]+\}", VARIES, text)]  # of a str.format template
        case ast.JoinedStr(values=parts):
            texts = [python_templates(part, scope)[0] for part in parts]
            return ["".join(texts)]
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            sides = (python_templates(side, scope) for side in (left, right))
            return ["".join(pair) for pair in itertools.product(*sides)]
        case ast.IfExp(body=body, orelse=other):
            return python_templates(body, scope) + python_templates(other, scope)
        case ast.Name(id=name):
            assigned = [n for n in ast.walk(scope) if isinstance(n, ast.Assign)]
            values = [n.value for n in assigned if name in map(ast.unparse, n.targets)]
            return [text for value in values for text in python_templates(value, scope)]
    return [VARIES]


def python_messages(path):
    """(place, template) of every `raise X(message)`, and of parser.error(message) and the like."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        call = None
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".error", ".warn")):
            call = node
        if call is None:
            continue
        where = place(path, node.lineno)
        assert isinstance(call, ast.Call) and call.args, f"{where} must raise a call with a message"
        message = call.args[0]
        inside = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
        if ast.unparse(message) != PASSED_ON:
            found = python_templates(message, inside[-1] if inside else tree)
            yield from ((where, template) for template in found or [VARIES])


def reasons(*names):
    """(place, template) of every reason of explain() or a log, from the files that decide."""
    for path in (ROOT / "pbs_attn" / name for name in names):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            texts = []
            if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("why"):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Route":
                texts = [node.args[1]]
            elif isinstance(node, ast.Assign):
                named = set(map(ast.unparse, node.targets)) & {
                    "reason",
                    "NO_INTERFACE",
                    "NO_HOST_DATA",
                }
                texts = [node.value] if named else []
            for text in texts:
                if isinstance(text, ast.JoinedStr) or isinstance(getattr(text, "value", 0), str):
                    (template,) = python_templates(text, tree)
                    yield place(path, text.lineno), re.sub(r"\{[\w.]+\}", VARIES, template)


# C++ and CMake

LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')


def cpp_arguments(code, start):
    """The source between the parenthesis at code[start] and its partner."""
    depth, at = 0, start
    while True:
        literal = LITERAL.match(code, at)
        at = literal.end() if literal else at + 1
        if not literal:
            depth += {"(": 1, ")": -1}.get(code[at - 1], 0)
            if depth == 0:
                return code[start + 1 : at - 1]


def cpp_template(expression):
    """Keeps literals, and replaces every other part (values and macros) by VARIES."""
    pieces = re.split(f"({LITERAL.pattern})", expression)
    return "".join(
        ast.literal_eval(piece) if nth % 2 else VARIES if re.search(r"\w", piece) else ""
        for nth, piece in enumerate(pieces)
    )


def cpp_sources():
    paths = [path for folder in ("csrc", "include") for path in (ROOT / folder).rglob("*.*")]
    return {path: re.sub(r"//[^\n]*", "", path.read_text()) for path in sorted(paths)}


def cpp_messages():
    """(place, template) of every call of fail(); of one that takes a text that a function makes,
    directly or in a variable, what that function returns."""
    sources = cpp_sources()
    for path, code in sources.items():
        for call in re.finditer(r"(?<!void )\bfail(?=\()", code):
            where = place(path, code.count("\n", 0, call.start()) + 1)
            arguments = cpp_arguments(code, call.end())
            templates = [cpp_template(arguments)]
            if templates == [VARIES]:
                assigned = rf"\b{re.escape(arguments)}\s*=\s*(\w+)\("
                maker = (re.match(r"(\w+)\(", arguments) or re.search(assigned, code))[1]
                body = rf"\b{maker}\([^)]*\)\s*{{(.*?)\n}}"
                (body,) = re.findall(body, "\n".join(sources.values()), re.DOTALL)
                templates = [cpp_template(v) for v in re.findall(r"return (.*?);", body, re.DOTALL)]
            yield from ((where, template) for template in templates if template)


def cmake_strings(pattern):
    for path in [ROOT / "CMakeLists.txt", *sorted((ROOT / "cmake").glob("*.cmake"))]:
        text = path.read_text()
        for found in re.finditer(rf'{pattern} "([^"]*)"', text):
            where = place(path, text.count("\n", 0, found.start()) + 1)
            yield where, re.sub(r"\$\{\w+\}", VARIES, found[1])


# The documents


def first_cells(name, header):
    """Templates in code, from the first column of each table whose first heading is `header`."""
    cells, head = set(), None
    for line in (ROOT / "docs" / name).read_text().splitlines():
        cell = line.strip("|").split(" | ")[0].strip() if line.startswith("|") else None
        head = None if cell is None else head or cell
        if head == header and cell != header and set(cell) - set("-|"):
            found = re.fullmatch(r"(`+) ?(.+?) ?\1", cell)
            assert found, f"{name}: the first cell must be code, got {cell}"
            cells.add(re.sub("<[^<>]+>", VARIES, found[2]))
    return cells


def assert_listed(name, header, raised):
    raised = [(where, re.sub(f"{VARIES}+", VARIES, template)) for where, template in raised]
    assert raised
    unread = [where for where, template in raised if not re.search(r"\w", template)]
    assert not unread, f"teach this test to read the messages of {unread}"
    listed = first_cells(name, header)
    missing = {template: where for where, template in raised if template not in listed}
    lines = [f"add a row:  | `{text}` |   ({where})" for text, where in missing.items()]
    unknown = listed - {template for _, template in raised}
    lines += [f"remove a row, no source has it:  | `{text}` |" for text in sorted(unknown)]
    assert not lines, "\n".join([f"docs/{name}, tables headed `{header}`:", *lines])


def test_every_message_is_listed():
    python = [m for path in sorted(ROOT.glob("pbs_attn/**/*.py")) for m in python_messages(path)]
    cpp, cmake = list(cpp_messages()), list(cmake_strings(r"message\(\s*(?:FATAL_ERROR|WARNING)"))
    assert min(map(len, (python, cpp, cmake))) > 3  # there is at least one message of each kind
    assert_listed("troubleshooting.md", "message", [*python, *cpp, *cmake])


def test_fail_alone_throws():
    """No other function throws, so cpp_messages finds every message of the library."""
    throws = [
        place(path, code.count("\n", 0, found.start()) + 1)
        for path, code in cpp_sources().items()
        for found in re.finditer(r"\bthrow\b|\b\w*TORCH_CHECK\w*\(", code)
    ]
    assert len(throws) == 1 and throws[0].startswith("include/pbs/fail.h"), throws


def test_every_build_status_is_listed():
    statuses = cmake_strings(r"set\(PBS_CUDA_STATUS")
    assert_listed("troubleshooting.md", "status", statuses)


def test_every_notice_is_listed():
    path = ROOT / "pbs_attn" / "_library.py"
    (function,) = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "missing_gpu_support"
    )
    values = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
    texts = [value for value in values if ast.unparse(value) != "None"]
    notices = [(place(path, v.lineno), t) for v in texts for t in python_templates(v, function)]
    assert_listed("troubleshooting.md", "notice", notices)


def test_every_reason_of_explain_is_listed():
    assert_listed("transformers.md", "reason", reasons("_hf_route.py", "_hf_explain.py"))


def test_every_reason_of_the_vllm_plugin_is_listed():
    assert_listed("serving.md", "reason", reasons("integrations/vllm/route.py"))


def test_reading_of_sources():
    """The forms in which a message may be written."""
    assert cpp_template('"a \\"", x, "\\" b" MACRO " c (", f(y, 1), ")"') == 'a "…" b… c (…)'
    assert cpp_arguments('fail("a) ", f(x), b); g()', 4) == '"a) ", f(x), b'
    path = ROOT / "pbs_attn" / "_library.py"
    assert next(t for _, t in python_messages(path)) == "pbs_attn needs torch >= 2.10, got …"
    scope = ast.parse('m = f"x {a!r:>3}" " y"\nm = "z" if b else "{w} v" + str(c)')
    found = python_templates(ast.parse("m", mode="eval").body, scope)
    assert found == ["x … y", "z", "… v…"]
