"""The picture of the README: a base, tasks that are fine-tuned from it one by one, and one model of all.

    python benchmarks/idea_figure.py documentation/idea.svg

Plain SVG, whose colours follow the reader's light or dark mode.
"""
import argparse
from pathlib import Path

WIDTH, HEIGHT = 860, 300
STYLE = """
  text { font: 15px sans-serif; fill: #1f2328; text-anchor: middle; }
  .small { font-size: 13px; fill: #59636e; }
  .bold { font-weight: bold; }
  rect { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.5; }
  path { fill: none; stroke: #59636e; stroke-width: 1.5; }
  .head { fill: #59636e; stroke: none; }
  .images { stroke-dasharray: 5 4; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .small { fill: #9198a1; }
    rect { fill: #151b23; stroke: #9198a1; }
    path { stroke: #9198a1; }
    .head { fill: #9198a1; }
  }"""
TASKS = {"liver": "#1f77b4", "spleen": "#d62728", "kidney": "#2ca02c"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(picture(), encoding="utf-8")


def picture() -> str:
    parts = [box(20, 110, 130, 80), text(85, 145, "one base", "bold"), text(85, 167, "a trained nnU-Net", "small")]
    for i, (task, colour) in enumerate(TASKS.items()):
        y = 40 + 80 * i
        parts += [arrow(150, 150, 270, y + 30), box(270, y, 210, 60),
                  f'<circle cx="296" cy="{y + 30}" r="10" fill="{colour}"/>',
                  text(385, y + 26, f"{task} model", "bold"), text(385, y + 46, "fine-tuned alone", "small"),
                  arrow(480, y + 30, 590, 150)]
    parts += [box(590, 90, 250, 120), text(715, 125, "one merged nnU-Net", "bold"),
              text(715, 150, "all three structures,"), text(715, 172, "one forward pass")]
    parts += [f'<circle cx="{691 + 24 * i}" cy="192" r="8" fill="{colour}"/>' for i, colour in
              enumerate(TASKS.values())]
    parts += [box(625, 240, 180, 44, "images"), text(715, 267, "8 images, no labels", "small"),
              arrow(715, 240, 715, 210, "images")]
    label = "A base, three tasks that are fine-tuned from it one by one, and one merged model of all three"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
            f"<style>{STYLE}\n</style>\n" + "\n".join(parts) + "\n</svg>\n")


def box(x: int, y: int, width: int, height: int, kind: str = "") -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'


def text(x: int, y: int, content: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{content}</text>'


def arrow(x: int, y: int, to_x: int, to_y: int, kind: str = "") -> str:
    """From one point to another, curved where it goes sideways."""
    middle = (x + to_x) / 2
    if x == to_x:
        line, tip = f"M{x} {y} L{to_x} {to_y + 9}", f"{to_x},{to_y} {to_x - 5},{to_y + 10} {to_x + 5},{to_y + 10}"
    else:
        line = f"M{x} {y} C{middle} {y} {middle} {to_y} {to_x - 9} {to_y}"
        tip = f"{to_x},{to_y} {to_x - 10},{to_y - 5} {to_x - 10},{to_y + 5}"
    return f'<path class="{kind}" d="{line}"/><polygon class="head" points="{tip}"/>'


if __name__ == "__main__":
    main()
