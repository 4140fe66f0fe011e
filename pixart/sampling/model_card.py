"""The model card of an exported pipeline: use, code, figures, lineage and the licences of its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

METADATA = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- {task}
- rectified-flow
---
"""
CHECKSUMS = "SHA256SUMS"  # file with the SHA-256 of all others, as sha256sum writes and checks it
CALLS = {1: 'class_labels=["none"]', 2: '"a red circle"'}
EDGES = str.maketrans({"|": "\\|", "\n": " ", "\r": " "})


def model_card(
    name: str,
    stage: int,
    *,
    files: Sequence[str],
    lineage: Mapping[str, str],
    licences: Mapping[str, str],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the card in Markdown.

    `files` are those with code, `lineage` are facts by name, `licences` are licences by the part of the pipeline, and
    `evaluations` are results by the name of the evaluation, limited to the variants of this checkpoint.
    """
    parts = [
        METADATA.format(task="text-to-image" if stage == 2 else "unconditional-image-generation"),
        f"# {name}\n",
        f"A diffusion transformer of stage {stage}: it samples images of {'prompts' if stage == 2 else 'classes'}.\n",
        "    from diffusers import DiffusionPipeline\n",
        '    pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        f"    image = pipeline({CALLS[stage]}).images[0]\n",
        "## Code\n",
        "The folder has code of its own, which diffusers runs with `trust_remote_code=True` only: "
        f"{', '.join(f'`{file}`' for file in files)}. Nothing else has to be installed.\n",
        "## Integrity\n",
        f"`sha256sum --check {CHECKSUMS}` in this folder finds every file that was altered since it was written. "
        "diffusers itself does not compare them.\n",
        "## Figures\n",
        *(figures(evaluations) if evaluations else ["No evaluation of this checkpoint is recorded.\n"]),
        "## Lineage\n",
        table(("fact", "value"), lineage.items()),
        "## Licences of the parts\n",
        table(("part", "licence"), licences.items()),
    ]
    return "\n".join(parts)


def figures(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a paragraph and a table of figures for each variant of each evaluation."""
    parts = []
    for name, results in evaluations.items():
        for variant in results["variants"]:
            judge = f", judged by {variant['judged_by']}" if variant["judged_by"] else ""
            parts.append(
                f"Evaluation {name}: {variant['weights']} weights, {variant['steps']} steps, guidance "
                f"{variant['guidance']:g}, {variant['images']:,} images, protocol "
                f"`{variant['protocol']['hash']}`{judge}.\n"
            )
            rows = [
                (key, f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})")
                for key, figure in variant["figures"].items()
            ]
            parts.append(table(("figure", "value (95 % interval)"), rows))
    return parts


def table(head: Sequence[str], rows: Any) -> str:
    """Return a table in Markdown; no cell breaks its row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).translate(EDGES) for cell in line)} |\n" for line in lines)
