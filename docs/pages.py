"""Write the pages that are made of other files: one for each config group, and some of the root's.

The comments of `conf/` are the text of the config reference: the lines above the first key say what a file
is, the comment beside a key what that key does.
"""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
# What each group is for, in the order in which a newcomer meets them.
GROUPS = {
    "model": "The network, its loss and its metrics. A model brings its data along; `data=` still wins.",
    "data": "The examples: where they come from, how they are split, and the batch size.",
    "optimizer": "PyTorch's optimizers, with all of their arguments.",
    "scheduler": "How the learning rate changes. `interval` says whether it changes by `step` or by `epoch`.",
    "trainer": "The arguments of Lightning's Trainer.",
    "callbacks": "Lightning's callbacks. A file that you add to `conf/callbacks` is chosen by its name.",
    "tracking": "Where runs are recorded, under which name, and what is recorded beside metrics.",
    "sweep": "What `-m` does when keys have several values: a grid or a search.",
    "experiment": "Presets. Each begins with its command, the score to expect, and the time it takes.",
}
ROOT_PAGES = {"BENCHMARKS.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "LOG.md": "log.md"}


def write_generated(folder: Path) -> None:
    """Write all generated pages; one whose text is the same is left, so that it is not built again."""
    pages = {f"config-{group}.md": group_page(group) for group in GROUPS}
    pages["config-top.md"] = top_page()
    pages |= {page: root_page(ROOT / name) for name, page in ROOT_PAGES.items()}
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def link_within_site(app: Any, name: str, content: list[str]) -> None:
    """Let links to files of the root, which are right in the repository, lead to their pages."""
    for file, page in ROOT_PAGES.items():
        content[0] = content[0].replace(f"](../{file}", f"](generated/{page}")
    content[0] = content[0].replace("](../conf/config.yaml)", "](generated/config-top.md)")
    content[0] = re.sub(r"\]\(\.\./conf/(\w+)\)", r"](generated/config-\1.md)", content[0])


def break_long_names(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Let a browser break long words of code after a slash, an underscore, a dot or a colon."""
    names = re.compile(r'(?<=<span class="pre">)[^<]{25,}(?=</span>)')
    body = context.get("body", "")
    context["body"] = names.sub(lambda name: re.sub(r"(?<=[/_.:])(?=\w)", "<wbr>", name[0]), body)


def root_page(path: Path) -> str:
    """Return a file of the root as a page, its links changed to the pages."""
    text = re.sub(r"\]\(docs/", "](../", path.read_text())
    for file, page in ROOT_PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text


def group_page(group: str) -> str:
    """Return the page of a config group: a section for each of its files."""
    parts = [f"# {group}\n", GROUPS[group] + "\n"]
    names = sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != "default", path.stem))
    for path in names:
        head, body = split_file(path.read_text())
        parts += [f"## {group}={path.stem}\n", *head, f"```yaml\n{body}```\n"]
    return "\n".join(parts)


def top_page() -> str:
    """Return the page of the keys that belong to no group."""
    _, body = split_file((CONF / "config.yaml").read_text())
    tree = yaml.safe_load(body)
    keys = ", ".join(f"`{key}`" for key in tree if key not in ("defaults", "hydra"))
    about = f"`conf/config.yaml` chooses a file of each group, and holds the keys outside the groups: {keys}."
    return f"# Top-level keys\n\n{about}\n\n```yaml\n{body}```\n"


def split_file(text: str) -> tuple[list[str], str]:
    """Split a config file into paragraphs made of the comment at its head, and the rest.

    A line `# python ...` is the command of a preset, `# Name: ...` begins a line of its own.
    """
    lines = [line for line in text.splitlines() if line != "# @package _global_"]
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    paragraphs: list[str] = []
    for line in (each.removeprefix("#").strip() for each in lines[:count]):
        if re.match(r"(python|tracklight) ", line):
            paragraphs.append(f"```bash\n{line}\n```\n")
        elif re.match(r"[A-Z]\w+: ", line):
            name, _, rest = line.partition(": ")
            paragraphs.append(f"**{name}**: {rest}\n")
        elif paragraphs and not paragraphs[-1].startswith(("```", "**")):
            paragraphs[-1] = f"{paragraphs[-1].rstrip()} {line}\n"
        else:
            paragraphs.append(f"{line}\n")
    return paragraphs, "\n".join(lines[count:]) + "\n"
