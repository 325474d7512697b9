"""Generated pages are what their generators write today, and the README's links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_integrations_page_is_current():
    command = [sys.executable, str(ROOT / "docs" / "generate_integrations.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, (
        "stale: run python docs/generate_integrations.py"
    )


def test_relative_links_of_the_pages_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    pages += sorted((ROOT / "docs").glob("*.md"))
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_python_of_the_readme_runs():
    import torch
    from trl import GRPOConfig

    from fastgrpo.testing import make_inputs

    x = make_inputs(16, 6, 71)
    names = {
        "torch": torch,
        "logits": x.logits.requires_grad_(),
        "ids": x.token_ids,
        "mask": x.mask,
        "rewards": torch.arange(16.0) % 3,
        "adv": x.advantage,
        "old_logps": x.old_logprob,
        "ref_logps": x.ref_logprob,
        "hidden": torch.randn(16, 6, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 71, bias=False),
        "grpo_config": GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[]),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    before, after = names["loss"], names["out"].loss
    assert torch.isfinite(before)
    assert torch.isfinite(after)
    assert names["logits"].grad is not None
