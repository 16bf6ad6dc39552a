"""Writes the media of the demo's questions: number 0 of the held-out samples of each task.

    python examples/media/make_task_media.py [FOLDER]

`digit.png` is one of scikit-learn's digits, `photograph.png` a crop of a photograph of
scikit-image, `scene.png` and `motion.gif` are drawn. The trained model has seen none of them (of
the photograph, other crops).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kimi_ops.model.chat_messages import media_in_order
from kimi_ops.tasks import make_sample
from kimi_ops.tasks.sample import Clip

FILES = {
    "digits": "digit.png",
    "photographs": "photograph.png",
    "scenes": "scene.png",
    "clips": "motion.gif",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the media of the demo's questions.")
    here = Path(__file__).parent
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="default: this folder")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for task, name in FILES.items():
        sample = make_sample(task, "held-out", 0)
        (item,) = media_in_order(sample.messages)
        source = item["source"]
        if isinstance(source, Clip):
            first, *others = source.frames
            milliseconds = round(1000 / source.fps)
            first.save(folder / name, save_all=True, append_images=others, duration=milliseconds)
        else:
            source.save(folder / name, optimize=True)
        question = sample.messages[0]["content"][-1]["text"]
        print(f"{folder / name}: {question} {sample.answer['content']}")


if __name__ == "__main__":
    main()
