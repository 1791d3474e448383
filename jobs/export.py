"""Export a trained run for serving: torch.export and ONNX programs, weights, vocabularies, feature spec, manifest.

python jobs/export.py --run-dir DIR --output DIR [--lake DIR]

docs/serving.md says how to use the directory. Without --lake the vocabularies are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_lake, check_output, check_run_dir, run_job


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--output", check_output, type=Path, required=True, help="created; must not hold anything")
    parser.add_place("--lake", check_lake, help="the lake of jobs/build_samples.py, for the vocabularies")
    arguments = parser.parse_args(argv)
    from usr_ray.serving.export import export_run  # loads torch

    manifest = export_run(arguments.run_dir, arguments.output, arguments.lake)
    for name, file in manifest["files"].items():
        print(f"  {name:<22} {file['bytes']:>14,} bytes")
    if arguments.lake is None and manifest["vocabulary"]["kind"] != "hash":
        print("no vocabularies: name the --lake to have them in the directory")
    worst = max(manifest["largest_difference_from_training_model"].values())
    print(
        f"{manifest['checkpoint']['name']} exported to {arguments.output}; probabilities within {worst:.1e} of "
        "the training model's"
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
