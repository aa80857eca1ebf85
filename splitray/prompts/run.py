"""A whole run over a prompts file: what is answered already is passed over, and the rest told as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from splitray.errors import InputError
from splitray.prompts.answering import RequestMaker, answers
from splitray.prompts.answers_file import AnswersFile, answers_file
from splitray.prompts.prompts_file import entries, num_prompts, prompts_file
from splitray.user_file import UserFile

if TYPE_CHECKING:
    from splitray.runtime.engine.engine import Engine


@dataclass(slots=True, kw_only=True)
class PromptsRun:
    """How far a run has come; `new_tokens` and `seconds` are of this run alone."""

    prompts: UserFile
    num_prompts: int
    file: AnswersFile
    new_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, since the first prompt was begun."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def told(self) -> str:
        """In words."""
        errors = f", {self.file.errors:,} with an error" if self.file.errors else ""
        rate = f", {self.tokens_per_s:.1f} tokens/s" if self.new_tokens else ""
        return f"{self.file.done:,} of {self.num_prompts:,} prompts answered{errors}{rate}"

    @property
    def document(self) -> dict[str, Any]:
        """What `splitray generate --prompts --json` prints."""
        return {
            "prompts": self.num_prompts,
            "answered": self.file.done,
            "errors": self.file.errors,
            "new_tokens": self.new_tokens,
            "tokens_per_s": self.tokens_per_s,
        }

    def go_on(
        self,
        launch: Callable[[], tuple[Engine, RequestMaker]],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Answer the prompts that have no answer yet. Nothing is launched if there are none.

        Raises:
            DeviceLost: a device died, and nothing could be done about it.
            InputError: nothing can be launched as asked, or the file has become another one.
        """
        if self.file.done >= self.num_prompts:
            return
        engine, requests = launch()
        began_s = clock()

        def came(tokens: int = 1) -> None:
            self.new_tokens, self.seconds = self.new_tokens + tokens, clock() - began_s
            tell(self.told)

        for answer in answers(engine, entries(self.prompts, first=self.file.done), requests, came):
            self.file.add(answer)
            came(0)


@contextmanager
def prompts_run(
    prompts: str, out: Path | None, stdout: TextIO, asked: Callable[[UserFile], Mapping[str, Any]], *, anew: bool
) -> Iterator[PromptsRun]:
    """A run over the file of that name (`-`: standard input), begun or taken up again.

    `asked` says of the file what its answers follow from. Without `out` they go to standard output.

    Raises:
        InputError: see `num_prompts` and `answers_file`, or both are one file.
    """
    with prompts_file(prompts) as file:
        count = num_prompts(file)  # a file that cannot be used must not cost the answers that are there
        if out is not None and out.exists() and out.samefile(Path(file.path).expanduser()):
            raise InputError("--out", expected="another file than that of the prompts", actual=out,
                             remedy="give another one")  # fmt: skip
        with answers_file(out, stdout, asked(file), anew=anew) as answered:
            yield PromptsRun(prompts=file, num_prompts=count, file=answered)
