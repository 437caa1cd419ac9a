"""From finals to a submission: builds the bundle, proves it, and with --upload brings it to Kaggle.

In    artifacts/stage3/*-final ; data/test.csv, or three rows of our own
Out   artifacts/bundle/, which appears only when it is verified; artifacts/submission.csv
Run   just submit
      just submit --upload --owner YOUR_KAGGLE_NAME

Until all checks have passed the bundle lies in artifacts/bundle-unverified, and the last good one stays.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import bundle
import verify
from bundle_manifest import read_verification
from common.console import cli, say
from common.locks import lock, move_in
from common.train.recipe import by_flags
from upload import upload


@dataclass(frozen=True, kw_only=True)
class Args:
    """Build, verify and upload a bundle."""

    build: bundle.Args
    proof: verify.Proof
    upload: bool = False
    """Upload the verified bundle with the official kaggle client."""
    owner: str | None = None
    """Kaggle user name, for --upload."""
    slug: str = "arena-preference-bundle"
    """Name of the data set and of the notebook on Kaggle."""

    def __post_init__(self) -> None:
        if self.upload and not self.owner:
            raise ValueError("--upload needs --owner, your Kaggle user name")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug) or not 6 <= len(self.slug) <= 50:
            raise ValueError(
                f"--slug is {self.slug!r}, expected 6 to 50 lower-case letters, digits and single hyphens"
            )


def main(args: Args) -> None:
    output = args.build.output or args.build.artifacts / "bundle"
    with lock(output):
        submit(output, args)


def submit(output: Path, args: Args) -> None:
    """Builds, proves and uploads what is not there yet."""
    manifest = bundle.describe(args.build)
    if bundle.is_same(output, manifest) and is_verified(output, args):
        say(f"{output} is up to date and verified")
    else:
        candidate = output.with_name(f"{output.name}-unverified")
        bundle.build(manifest, args.build, candidate, earlier=(output,))
        verify.verify(candidate, args.proof, args.build.artifacts)
        move_in(candidate, output)
        say(f"{output} is complete")
    if args.upload:
        upload(output, owner=args.owner, slug=args.slug)


def is_verified(output: Path, args: Args) -> bool:
    """Whether the bundle was proven, and on the test.csv that is asked for now."""
    try:
        found = read_verification(output)
    except ValueError as error:
        say(f"{error}")
        return False
    submission = verify.submission_path(args.proof, args.build.artifacts)
    return found["test"] == verify.describe_test(args.proof) and submission.is_file()


if __name__ == "__main__":
    cli(main, arguments=by_flags(Args))
