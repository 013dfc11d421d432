"""A captioner that is only opened when there is a picture for it, as opening one may mean to load gigabytes."""

from collections.abc import Callable, Sequence

from PIL import Image

from .captioner import Answer, Captioner, CaptioningStopped


class Later:
    """The captioner that ``open`` gives; until the first picture it takes one at a time and no memory."""

    def __init__(self, open: Callable[[], Captioner]):
        self._open, self._captioner = open, None

    @property
    def batch_size(self) -> int:
        return self._captioner.batch_size if self._captioner else 1

    @property
    def writes_tags(self) -> bool:
        return self._captioner is not None and self._captioner.writes_tags

    @property
    def follows_instructions(self) -> bool:
        return self._captioner is None or self._captioner.follows_instructions

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        if self._captioner is None:
            try:
                self._captioner = self._open()
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                # No picture can be captioned without it.
                raise CaptioningStopped(str(error)) from error
        return self._captioner.caption(images, instruction)

    def close(self) -> None:
        if self._captioner is not None:
            self._captioner.close()
