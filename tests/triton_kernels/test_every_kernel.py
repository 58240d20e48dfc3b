"""Every kernel of the tree is launched by `cases.py`, which is what the interpreter and the compilers are given."""

from __future__ import annotations

import ast

import torch
import triton
from cases import CASES, Numbers
from judge import DEVICE


def is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def kernels(root) -> set[str]:
    """Names of all functions under @triton.jit that no other one calls: those that a host launches."""
    functions = [
        node
        for file in sorted((root / "oodkern").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and is_jit(node)
    ]
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {function.name for function in functions} - {ast.unparse(call.func) for call in calls}


def test_every_kernel_has_a_case(root, monkeypatch):
    ran = set()
    runner = type(triton.jit(lambda: None))  # compiled on a GPU, interpreted elsewhere
    run = runner.run

    def recorded(kernel, *arguments, **keywords):
        ran.add(kernel.fn.__name__)
        return run(kernel, *arguments, **keywords)

    monkeypatch.setattr(runner, "run", recorded)
    for case in CASES:
        case(Numbers(torch.float32, 16, DEVICE))
    assert ran == kernels(root)


def test_launches_are_made_in_one_place(root):
    """`_host.launch` takes the device of the tensors and the options that every launch needs."""
    for file in (root / "oodkern" / "triton_kernels").glob("*.py"):
        launches = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        assert launches == (
            ["kernel[grid](*arguments, **constants, enable_fp_fusion=True)"] if file.stem == "_host" else []
        )
