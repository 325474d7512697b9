"""Run the default job and picture it: docs/images/terminal.svg while it trains, docs/images/report.png at its end.

python docs/generate_images.py          needs chromium for the second; about two minutes of processor time
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageChops
from rich.console import Console

from fastgrpo import cli
from fastgrpo.trainer import run
from fastgrpo.trainer.output import display

IMAGES = Path(__file__).resolve().parent / "images"
STEP = 16  # when the terminal is pictured
WIDTH = 104
REPORT_SIZE = "1120,4000"


class Pictured(display.LiveDisplay):
    """The display of a terminal, which keeps what it shows after a certain step."""

    def __init__(self) -> None:
        super().__init__(console := Console(file=io.StringIO(), force_terminal=True, width=WIDTH))
        self.said, self.console = ["$ fastgrpo train", "..."], console

    def note(self, text: str) -> None:
        """See `Display`."""
        super().note(text)
        self.said.append(text)

    def advance(
        self, done: int, text: str = "", numbers: Mapping[str, float] | None = None
    ) -> None:
        """See `Display`."""
        super().advance(done, text, numbers)
        if numbers is not None and done == STEP:
            picture = Console(record=True, file=io.StringIO(), force_terminal=True, width=WIDTH)
            for line in self.said:
                picture.print(line, markup=False, highlight=False)
            picture.print(self._render())
            svg = picture.export_svg(title="fastgrpo train", clear=False)
            svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing is fetched
            lines = (line.rstrip() for line in svg.splitlines())
            (IMAGES / "terminal.svg").write_text("\n".join(line for line in lines if line) + "\n")


def shrink(path: Path) -> None:
    """Cuts the white below the page, and keeps 128 colours."""
    picture = Image.open(path).convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    box = ImageChops.difference(picture, white).getbbox()
    assert box is not None
    picture = picture.crop((0, 0, picture.width, box[3] + box[1]))
    coverage = Image.Quantize.MAXCOVERAGE  # keeps the few pixels of a rare colour
    picture.quantize(128, method=coverage, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> int:
    """Write both pictures; returns the exit code."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("error: report.png needs chromium", file=sys.stderr)
        return 2
    IMAGES.mkdir(exist_ok=True)
    run.make_display = Pictured
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if code := cli.main(["train", "story", "--completions-to-show", "1"]):
            return code
        target = IMAGES / "report.png"
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--window-size={REPORT_SIZE}", f"--screenshot={target}"]
        page = Path(folder, "runs", "story", "report.html")
        subprocess.run([*command, f"file://{page}"], check=True, capture_output=True)
        shrink(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
