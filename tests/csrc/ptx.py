"""nvcc's PTX as C++ for the emulator: the kernels as they are compiled for a GPU, with their inline
PTX, run on tensors of the CPU.

Every PTX instruction becomes one statement of a function that every thread runs; ptx_machine.h says
what the instructions do. An instruction that is not known raises.
"""

import re
from collections.abc import Iterator

# nvcc calls what it drops `tmp`.
_REGISTER = re.compile(r"%[a-z]+\d+|tmp")
_SPECIAL = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {
        "tid": "threadIdx", "ctaid": "blockIdx", "nctaid": "gridDim",
    }.items()
    for axis in "xyz"
}  # fmt: skip
_BRACES = {"OPEN": "  {", "CLOSE": "  }"}
# What these give, for operands a, b, c of the instruction's type.
_VALUES = {
    "abs": "absolute(a)",
    "add": "sum(a, b)",
    "and": "a & b",
    "div": "a / b",
    "ex2": "power_of_two_to_zero(a)",
    "fma": "std::fma(a, b, c)",
    "lg2": "std::log2(a)",
    "mad.lo": "sum(product(a, b), c)",
    "max": "greater(a, b)",
    "min": "less(a, b)",
    "mov": "a",
    "mul": "a * b",
    "mul.hi": "upper_product(a, b)",
    "mul.lo": "product(a, b)",
    "neg": "negative(a)",
    "not": "complement(a)",
    "or": "a | b",
    "popc": "(Bits32)__builtin_popcount(a)",
    "rcp": "1.0f / a",
    "rem": "a % b",
    "sub": "difference(a, b)",
    "xor": "a ^ b",
}
_COMPARISONS = {"eq": "==", "ge": ">=", "gt": ">", "le": "<=", "lt": "<", "ne": "!="}
# Rounding and precision: the machine rounds to nearest, and its functions are exact.
_MANNERS = {"rn", "approx", "ftz", "uni", "sync", "aligned"}


def cpp_of(ptx: str) -> str:
    """C++ with a function for every kernel of a PTX file, and `kernel_of(name)` that finds one.

    Raises:
        ValueError: an instruction is not known.
    """
    functions, table = [], []
    for match in re.finditer(r"\.entry (\w+)\(\s*\.param [^)]*\)[^{]*\{(.*?)\n\}", ptx, re.DOTALL):
        name, body = match.groups()
        head = f"static void {name}(const unsigned char* param)"
        functions.append(f"{head} {{\n{_body(name, body)}\n}}")
        table.append(f'  if (name == "{name}") return {name};')
    lookup = "\n".join(
        ["Kernel kernel_of(const std::string& name) {", *table, "  return nullptr;", "}"]
    )
    head = '#include "ptx_machine.h"\n\nnamespace adaptive::ptx {'
    return "\n\n".join([head, *functions, lookup, "}"]) + "\n"


def _body(kernel: str, body: str) -> str:
    shared = re.findall(r"\b(\w*shared\w*)\b", body)
    body = re.sub(r"//[^\n]*", "", body).replace(f"{kernel}_param_0", "PARAM")
    for symbol in set(shared) - {"shared"}:
        body = body.replace(symbol, "SHARED")
    # Inline PTX may have registers of its own, in braces.
    body = re.sub(r";\s*\}", "; CLOSE;", re.sub(r"\{\s*(?=\.reg)", "OPEN; ", body))
    lines = ["  unsigned char* place;"]
    for text in body.split(";"):
        *labels, statement = re.split(r"\$(\w+):", text.strip())
        lines += [f"{label}:" for label in labels if label.strip()]
        statement = statement.strip()
        if statement in _BRACES:
            lines.append(_BRACES[statement])
        elif statement.startswith(".reg"):
            lines.append(_declaration(statement))
        elif statement and not statement.startswith(".pragma"):
            lines.append(f"  {_statement(statement)}")
    return "\n".join([*lines, "  return;"])


def _declaration(statement: str) -> str:
    kind, rest = re.fullmatch(r"\.reg \.(\w+)\s+(\S+)", statement).groups()
    storage = "bool" if kind == "pred" else f"Bits{kind[1:]}"
    if _REGISTER.fullmatch(rest):
        return f"  {storage} {_name(rest)} = 0;"
    stem, count = re.fullmatch(r"%([a-z]+)<(\d+)>", rest).groups()
    return f"  {storage} {', '.join(f'{stem}{i} = 0' for i in range(int(count)))};"


def _statement(statement: str) -> str:
    predicate, opcode, rest = re.fullmatch(
        r"(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s*(.*)", statement, re.DOTALL
    ).groups()
    operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
    code = _code(opcode, operands, statement)
    if predicate is None:
        return f"{code};"
    return f"if ({predicate.replace('%', '')}) {{ {code}; }}"


def _code(opcode: str, operands: list[str], statement: str) -> str:
    name, *parts = opcode.split(".")
    words = [part for part in parts if part not in _MANNERS]
    if name == "bra":
        return f"goto {operands[0][1:]}"
    if name == "ret":
        return "return"
    if name == "bar":
        return "synchronize_block()"
    if name in ("ld", "st"):
        return "; ".join(_access(name, words, operands))
    if opcode == "mov.b64" and operands[0].startswith("{"):
        low, high = map(_name, _members(operands[0]))
        value = _read(operands[1], "b64")
        return f"{low} = (Bits32){value}; {high} = (Bits32)({value} >> 32)"
    if name == "cvta":
        return f"{_name(operands[0])} = {_read(operands[1], words[-1])}"
    if name == "shfl":
        target = _name(operands[0].split("|")[0])
        assert words == ["bfly", "b32"], statement
        values = ", ".join(_read(operand, "b32") for operand in operands[1:])
        return f"{target} = shuffled({values})"
    if opcode == "vote.sync.ballot.b32":
        return f"{_name(operands[0])} = ballot({operands[1].replace('%', '')})"
    if name == "ldmatrix":
        registers = ", ".join(map(_name, _members(operands[0])))
        is_transposed = "true" if "trans" in words else "false"
        return f"load_matrices<{is_transposed}>({_address(operands[1])}, {registers})"
    if name == "mma":
        assert words[:3] == ["m16n8k16", "row", "col"] and words[3] == words[6] == "f32", statement
        groups = [", ".join(map(_name, _members(operand))) for operand in operands]
        assert groups[0] == groups[3], statement
        return f"multiply_accumulate<{words[4].upper()}>({', '.join(groups[:3])})"
    if opcode.startswith("cp.async"):
        return _copy(parts, operands, statement)
    if name == "cvt":
        return _conversion(words, operands, statement)
    if name == "setp":
        return _comparison(words, operands)
    if name == "selp":
        a, b = (_read(operand, words[0]) for operand in operands[1:3])
        return _write(operands[0], words[0], f"{_name(operands[3])} ? {a} : {b}")
    if name in ("shl", "shr"):
        a, count = _read(operands[1], words[0]), _read(operands[2], "u32")
        return _write(operands[0], words[0], f"shifted_{name[2]}({a}, {count})")
    if opcode.startswith("mul.wide"):
        wide = f"{words[-1][0]}{2 * int(words[-1][1:])}"
        a, b = (f"({_cpp(wide)}){_read(operand, words[-1])}" for operand in operands[1:])
        return _write(operands[0], wide, f"{a} * {b}")
    key = ".".join([name, *words[:-1]])
    if key not in _VALUES:
        raise ValueError(f"unknown PTX instruction: {statement}")
    given = dict(zip("abc", (_read(operand, words[-1]) for operand in operands[1:])))
    value = re.sub(r"\b[abc]\b", lambda match: given[match[0]], _VALUES[key])
    return _write(operands[0], words[-1], value)


def _access(name: str, words: list[str], operands: list[str]) -> Iterator[str]:
    """A load or store, an element of a vector after the other."""
    space, *vector, kind = words
    address, value = operands if name == "st" else reversed(operands)
    members = _members(value)
    assert vector in ([], [f"v{len(members)}"])
    size = f"{len(members)} * sizeof({_cpp(kind)})"
    yield f"place = {space}_memory({_address(address)}, {size})"
    for i, member in enumerate(members):
        if name == "ld":
            yield _write(member, kind, f"loaded<{_cpp(kind)}>(place, {i})")
        else:
            yield f"store<{_cpp(kind)}>(place, {i}, {_read(member, kind)})"


def _copy(parts: list[str], operands: list[str], statement: str) -> str:
    if parts == ["async", "commit_group"]:
        return "commit_copies()"
    if parts == ["async", "wait_group"]:
        return f"wait_for_copies<{operands[0]}>()"
    assert parts == ["async", "cg", "shared", "global"] and operands[2] == "16", statement
    return f"start_copy({_address(operands[0])}, {_address(operands[1])}, {_name(operands[3])})"


def _conversion(words: list[str], operands: list[str], statement: str) -> str:
    to, source = words
    if to in ("bf16x2", "f16x2"):
        # The first source becomes the upper half.
        high, low = (_read(operand, "f32") for operand in operands[1:])
        kind = "BFLOAT16" if to == "bf16x2" else "FLOAT16"
        return f"{_name(operands[0])} = pack<{kind}>({low}, {high})"
    if (to, source) == ("f32", "f16"):
        return _write(operands[0], to, f"unpack<FLOAT16>({_read(operands[1], 'u16')})")
    if source.startswith("f"):
        raise ValueError(f"unknown PTX instruction: {statement}")
    return _write(operands[0], to, f"({_cpp(to)}){_read(operands[1], source)}")


def _comparison(words: list[str], operands: list[str]) -> str:
    how, kind = words
    a, b = (_read(operand, kind) for operand in operands[1:])
    is_unordered = f"{a} != {a} || {b} != {b}"
    if how == "nan":
        value = is_unordered
    elif kind == "f32" and how == "ne":
        value = f"{a} < {b} || {a} > {b}"
    elif kind == "f32" and how.endswith("u"):
        value = f"{is_unordered} || {a} {_COMPARISONS[how[:-1]]} {b}"
    else:
        value = f"{a} {_COMPARISONS[how]} {b}"
    return f"{_name(operands[0])} = {value}"


def _members(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _name(operand: str) -> str:
    """A register as a variable."""
    assert _REGISTER.fullmatch(operand), operand
    return operand.removeprefix("%")


def _address(operand: str) -> str:
    base, _, offset = operand.strip("[]").partition("+")
    kind = "b32" if re.fullmatch(r"%r\d+", base) else "b64"
    return f"({_read(base, kind)} + {int(offset or 0)})"


def _read(operand: str, kind: str) -> str:
    """An operand as a value of the instruction's type."""
    if operand in ("PARAM", "SHARED"):
        return {"PARAM": "(Bits64)param", "SHARED": "SHARED_START"}[operand]
    if operand in _SPECIAL:
        return f"(Bits32){_SPECIAL[operand]}"
    if operand.startswith("0f"):
        return f"value_of<float>((Bits32)0x{operand[2:]}u)"
    if operand.startswith("%"):
        return _name(operand) if kind == "pred" else f"value_of<{_cpp(kind)}>({_name(operand)})"
    if kind == "pred":
        return operand
    return f"({_cpp(kind)}){int(operand)}ll"


def _write(operand: str, kind: str, value: str) -> str:
    if kind == "pred":
        return f"{_name(operand)} = {value}"
    return f"write<{_cpp(kind)}>({_name(operand)}, {value})"


def _cpp(kind: str) -> str:
    if kind == "f32":
        return "float"
    return f"{'Signed' if kind[0] == 's' else 'Bits'}{int(kind[1:])}"
