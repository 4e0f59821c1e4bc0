"""Draw the README's pictures of photographs that ship in scikit-image.

    python tests/pictures.py demo out/demo assets/demo.jpg
    python tests/pictures.py latent out/mini-decoder assets/latent.jpg
    python tests/pictures.py texture out/texture assets/texture.jpg

Each is in the public domain, as skimage.data says: astronaut (NASA), coffee (Rachel Michetti, CC0),
chelsea (Stefan van der Walt, CC0), rocket (SpaceX).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import seed_for
from degrade import DEGRADATIONS
from evaluate import Pipeline
from model import find_part

SIDE = 256
PHOTOS = {  # name: left and top of what is shown
    "astronaut": (95, 0),
    "coffee": (170, 60),
    "chelsea": (90, 10),
    "rocket": (230, 150),
}
SHOWN = {  # in demo: photo: (degradation, its strengths)
    "astronaut": ("gaussian_noise", {"sigma": 25}),
    "coffee": ("jpeg", {"quality": 10}),
    "chelsea": ("gaussian_blur", {"kernel": 9}),
    "rocket": ("downscale", {"factor": 3}),
}


def photo(name):
    """Return a SIDE x SIDE crop of a photograph."""
    left, top = PHOTOS[name]
    whole = Image.fromarray(getattr(skimage.data, name)())
    return whole.crop((left, top, left + SIDE, top + SIDE))


def degraded(picture, degradation, strengths):
    rng = np.random.default_rng(seed_for(0, 0, "the README's pictures"))
    return DEGRADATIONS[degradation](picture, rng, **strengths)


def grid(rows):
    """Put pictures of equal size side by side, row by row."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * width, len(rows) * height))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    return sheet


def draw_demo(checkpoint):
    """Four degradations in two rows of two: degraded | restored | clean."""
    restore = Pipeline.load(checkpoint)
    shown = []
    for name, (degradation, strengths) in SHOWN.items():
        clean = photo(name)
        condition = degraded(clean, degradation, strengths)
        shown.append([condition, restore(condition), clean])
    return grid([shown[0] + shown[1], shown[2] + shown[3]])


def draw_latent(checkpoint):
    """Degraded | plain decoder | decoder that sees the degraded picture | clean."""
    seeing = Pipeline.load(checkpoint)
    plain = Pipeline.load(find_part(seeing.checkpoint, "base"))
    rows = []
    for name in ("astronaut", "coffee"):
        clean = photo(name)
        condition = degraded(clean, "gaussian_noise", {"sigma": 25})
        rows.append([condition, plain(condition), seeing(condition), clean])
    return grid(rows)


def draw_texture(checkpoint):
    """Degraded | one step | 20 steps | clean, enlarged twice."""
    restore = Pipeline.load(checkpoint)
    clean = photo("astronaut")
    condition = degraded(clean, "gaussian_noise", {"sigma": 25})
    prompt = "Remove gaussian noise."
    row = [condition, restore(condition, prompt, steps=1), restore(condition, prompt, steps=20)]
    box = 64, 64, 192, 192
    enlarged = []
    for picture in [*row, clean]:
        enlarged.append(picture.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return grid([enlarged])


DRAW = {"demo": draw_demo, "latent": draw_latent, "texture": draw_texture}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=list(DRAW))
    parser.add_argument("checkpoint", help="run folder of train.py")
    parser.add_argument("out", help="where to write the picture")
    args = parser.parse_args()
    sheet = DRAW[args.which](args.checkpoint)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, quality=88)
    print(f"{args.out}: {sheet.width}x{sheet.height}")


if __name__ == "__main__":
    main()
