"""Check, part by part, whether this code reads published SANA weights rightly: for their first run.

    python tests/published.py [--model sana1.5-1.6b] [--device cuda]
    python tests/published.py --photos photos.csv      four of your own, of 1024 pixels or more

Prints a line a part: ok or OFF, its figure, and what is expected. Exit status 1 if one is off. A
part that raises an error is off, and the others are checked all the same. Two pictures are saved.

The photos are scikit-image's (pip install scikit-image), enlarged: they lack the finest detail,
which makes them easier for the autoencoder. --photos names a CSV with the columns image_path and
caption; the caption says what the photo shows.

Nobody has run this on published weights: what is expected comes from the papers, or from what a
network would give that has learnt nothing. The last part trains as train.py does by default, and
saves a checkpoint for a moment (SANA 1.5 1.6B: 29 GB of GPU memory, 19 GB of disk space).
"""

import functools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageOps
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import CsvPairs, check_device, seed_for, to_image, to_tensor
from degrade import Parser, UserError, between, open_image, run_script, save_image
from evaluate import psnr
from model import SAMPLERS, SHIFT, Gemma2, GemmaTokenizer, Restorer, Sana, encode_prompts
from model import flow_loss, guided, pad_text
from vae import DCAE, load_config, load_pretrained, read_json, resolve_model, weight_files

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = {  # all in the public domain (see pictures.py). name: left, top, side; what it shows
    "astronaut": (0, 0, 512, "a smiling astronaut in an orange suit beside a flag and a shuttle"),
    "coffee": (80, 0, 400, "an espresso in a red cup on a red saucer on a wooden table"),
    "chelsea": (50, 0, 300, "a close-up of the face of a tabby cat with green eyes"),
    "rocket": (190, 0, 427, "a white rocket on its launch pad at dusk, under a dark blue sky"),
}
SIGMAS = [0.3, 0.5, 0.7, 0.9]
GUIDANCE = 4.5  # SANA's own, for text to image
SAMPLING_STEPS = 20
TRAINING_STEPS = 5
NETWORKS = {"transformer": Sana, "vae": DCAE, "text_encoder": Gemma2}
COUNTS = {  # {part: {model: (tensors, numbers in them)}}, counted with the peers' classes
    "transformer": {
        "SANA 1.5 1.6B": (476, 1_604_641_952),
        "SANA 1.5 4.8B": (1396, 4_721_825_952),
        "SANA 1.0 1.6B": (396, 1_604_462_752),
        "SANA 1.0 0.6B": (548, 591_747_872),
    },
    "vae": {"DC-AE f32c32": (375, 312_250_275)},
    "text_encoder": {"Gemma-2-2b": (288, 2_614_341_888)},
}


def bundled_photos(size):
    """Return scikit-image's photos [4, 3, size, size], captions, and whether they are enlarged."""
    try:
        import skimage.data
    except ImportError:
        advice = "pip install scikit-image, or give --photos"
        raise UserError(f"the photos are scikit-image's: {advice}") from None
    photos = []
    for name, (left, top, side, _) in PHOTOS.items():
        photo = Image.fromarray(getattr(skimage.data, name)())
        photo = photo.crop((left, top, left + side, top + side))
        photos.append(to_tensor(photo.resize((size, size), Image.Resampling.LANCZOS)))
    sides = [side for _, _, side, _ in PHOTOS.values()]
    captions = [caption for _, _, _, caption in PHOTOS.values()]
    return torch.stack(photos), captions, min(sides) < size


def own_photos(table, size):
    """Return the middles of a CSV's first four photos, as bundled_photos does."""
    rows = CsvPairs(table).rows[:4]
    captions = [row.caption for row in rows]
    if len(rows) < 4 or not all(captions):
        raise UserError(f"--photos {table}: give four photos with captions that describe them")
    pictures = [open_image(row.clean) for row in rows]
    enlarged = any(min(picture.size) < size for picture in pictures)
    photos = [to_tensor(ImageOps.fit(picture, (size, size))) for picture in pictures]
    return torch.stack(photos), captions, enlarged


class Published:
    """A pretrained model, and what it makes of photos. Each is made once, when it is asked for.

    What cannot be made raises for every part that needs it. folder: in the hub's layout. pixels
    [4, 3, H, W] in [-1, 1].
    """

    def __init__(self, folder, pixels, captions, device="cpu"):
        self.folder = folder
        self.pixels = pixels.to(device)
        self.captions = captions
        self.device = device
        # on a GPU as they are trained and used there
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16

    @functools.cached_property
    def autoencoder(self):
        network = load_pretrained(DCAE, self.folder / "vae", torch.float32)
        return network.requires_grad_(False).to(self.device)

    @functools.cached_property
    def latents(self):
        """[4, C, H/f, W/f], made one by one, which spares memory."""
        return torch.cat([self.autoencoder.encode(photo) for photo in self.pixels.split(1)])

    @functools.cached_property
    def restorer(self):
        """The text-to-image model: a restorer without a condition."""
        sana = load_pretrained(Sana, self.folder / "transformer", self.dtype)
        return Restorer(sana, "none").requires_grad_(False).to(self.device)

    @functools.cached_property
    def texts(self):
        """{what the transformer reads: (text, text_mask) for the four photos}."""
        gemma = load_pretrained(Gemma2, self.folder / "text_encoder", self.dtype).to(self.device)
        tokenizer = GemmaTokenizer(self.folder / "tokenizer")
        *true, nothing = encode_prompts(tokenizer, gemma, [*self.captions, ""])
        bare = []
        for caption in self.captions:
            ids = torch.tensor([tokenizer.encode(caption.lower().strip())], device=self.device)
            with torch.no_grad():
                bare.append(gemma(ids, torch.ones_like(ids))[0].cpu())
        rows = {"true": true, "empty caption": 4 * [nothing], "no instruction": bare}
        texts = {}
        for name, some in rows.items():
            texts[name] = [tensor.to(self.device) for tensor in pad_text(some)]
        return texts

    @functools.cached_property
    def losses(self):
        """{what the transformer reads: [flow loss on the photos, at each of SIGMAS]}."""
        losses = {}
        for name, text in self.texts.items():
            losses[name] = [self.loss(self.restorer, self.latents, text, s) for s in SIGMAS]
        return losses

    @torch.no_grad()
    def loss(self, restorer, latents, text, sigma):
        """Return the mean flow loss of latents [B, C, h, w]. Each has the next one as condition."""
        drawn = torch.full((len(latents),), sigma, device=self.device), self.noise(latents)
        return flow_loss(restorer, latents, latents.roll(1, 0), *text, *drawn).mean().item()

    def noise(self, latents, purpose="loss"):
        generator = torch.Generator().manual_seed(seed_for(0, 0, f"published {purpose}"))
        return torch.randn(latents.shape, generator=generator).to(self.device)


# --------------------------------------------------------------------------------------------------
# The parts. Each returns its figure, and whether it is as expected.


def tensors(folder, part):
    """Compare names and shapes with the network of config.json, and their number with COUNTS.

    (The tests compare the network's names and shapes with the peers' own.)
    """
    expected = load_config(NETWORKS[part], folder / part).state_dict()
    prefix = getattr(NETWORKS[part], "PREFIX", "")
    found = {}
    for path in weight_files(folder / part):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                found[name.removeprefix(prefix)] = file.get_slice(name).get_shape()
    wrong = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        if list(expected[name].shape) != found[name]:
            wrong.append(name)
    count = len(found), sum(math.prod(shape) for shape in found.values())
    known = [name for name, published in COUNTS[part].items() if published == count]
    model = known[0] if known else "of no published model"
    figure = f"{count[0]} tensors of {count[1]:,} numbers, {model}"
    if wrong:
        figure += f"; {len(wrong)} do not fit config.json, such as {wrong[0]}"
    return figure, bool(known) and not wrong


def round_trip(p, low, high):
    scores = []
    for photo, latents in zip(p.pixels.split(1), p.latents.split(1)):
        scores.append(psnr(p.autoencoder.decode(latents).clamp(-1, 1), photo).item())
    each = ", ".join(f"{score:.1f}" for score in scores)
    return f"{mean(scores):.1f} dB ({each})", low <= mean(scores) <= high


def spread(p):
    """The scaling factor makes the standard deviation of many pictures' latents 1."""
    std = p.latents.std().item()
    return f"{std:.2f}", 0.7 <= std <= 1.3


def true_captions(p, i):
    loss = p.losses["true"][i]
    return f"{loss:.3f} (empty caption: {p.losses['empty caption'][i]:.3f})", loss < 1


def no_better(p, name):
    """Compare the mean over all sigmas with that of true captions, if these work.

    A hundredth is left to chance.
    """
    true, other = mean(p.losses["true"]), mean(p.losses[name])
    return f"{other:.3f} (true captions: {true:.3f})", true < 1 and other >= 0.99 * true


def picture(p, sampler, out):
    """Make a picture of the first caption, save it, and take its own flow loss."""
    prompt = [tensor[:1] for tensor in p.texts["true"]]
    empty = [tensor[:1] for tensor in p.texts["empty caption"]]
    shift = read_json(p.folder / "scheduler/scheduler_config.json").get("flow_shift", SHIFT)
    velocity = guided(p.restorer, None, prompt, empty, GUIDANCE)
    noise = p.noise(p.latents[:1], "picture")
    latents = SAMPLERS[sampler](velocity, noise, SAMPLING_STEPS, shift)
    path = out / f"{sampler}.png"
    save_image(to_image(p.autoencoder.decode(latents)[0]), path)
    std, loss = latents.std().item(), p.loss(p.restorer, latents, prompt, 0.5)
    return f"loss {loss:.3f}, deviation {std:.2f}: {path}", loss < 1 and 0.5 <= std <= 1.5


@torch.no_grad()
def projection(p):
    """Compare a restorer before training with the text-to-image model, at each sigma."""
    restorer = Restorer(p.restorer.sana, "projection").to(p.device)
    largest = 0.0
    for sigma in SIGMAS:
        timestep = torch.full((4,), 1000 * sigma, device=p.device)
        inputs = p.noise(p.latents), p.latents, timestep, *p.texts["true"]
        difference = restorer(*inputs) - p.restorer(*inputs)
        largest = max(largest, difference.abs().max().item())
    loss = mean([p.loss(restorer, p.latents, p.texts["true"], sigma) for sigma in SIGMAS])
    return f"difference {largest:g}, loss {loss:.3f}", largest == 0 and loss < 1


def training(folder, pixels, device, out):
    """Do the first steps of train.py with its defaults, on crops of half the photos' side."""
    with tempfile.TemporaryDirectory(dir=out, prefix="training-") as place:
        place = Path(place)
        for i, photo in enumerate(pixels):
            save_image(to_image(photo), place / f"{i}.png")
        # no captions, no conditions: train.py degrades, and its prompts say how
        (place / "photos.csv").write_text("image_path\n0.png\n1.png\n2.png\n3.png\n")
        command = [sys.executable, ROOT / "train.py", "--data", place / "photos.csv"]
        command += ["--model", folder.resolve(), "--device", device, "--out", place / "run"]
        command += ["--steps", TRAINING_STEPS, "--resolution", pixels.shape[2] // 2]
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"train.py: {done.stderr[-190:]}")
        batch_size = read_json(place / "run/config.json")["args"]["batch_size"]
        return judge_log((place / "run/log.jsonl").read_text(), batch_size)


def judge_log(text, batch_size):
    """Say what a log of TRAINING_STEPS steps shows, whose last line is their mean."""
    lines = [json.loads(line) for line in text.splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    seconds = batch_size / last["images_per_second"]
    memory = f"{last['memory_gb']:.1f} GB" if "memory_gb" in last else "memory not measured"
    figure = f"mean loss {last['loss']:.3f}, {last['skipped']} not finite, {seconds:.2f} s each"
    finite = last["step"] == TRAINING_STEPS and last["skipped"] == 0
    return f"{figure} (the first is slow), {memory}", finite and last["loss"] < 1.5


# --------------------------------------------------------------------------------------------------


def check(name, expected, part, *inputs):
    """Print the line of a part, and return whether it is as expected."""
    try:
        figure, holds = part(*inputs)
    except Exception as error:  # whatever it is, the other parts are still to be checked
        reason = " ".join(str(error).split())
        figure, holds = f"{type(error).__name__}: {reason[:200]}", False
    print(f"{'ok ' if holds else 'OFF'}  {name}: {figure} | expected: {expected}", flush=True)
    return holds


def check_model(p, enlarged, out):
    """Check all but the training steps -> [whether a part is as expected]."""
    results = []
    for part, known in COUNTS.items():
        counts = [f"{count}, {numbers:,} ({name})" for name, (count, numbers) in known.items()]
        expected = f"all of config.json, none else; {' or '.join(counts)}"
        results.append(check(part, expected, tensors, p.folder, part))
    high = 40 if enlarged else 32
    expected = f"26 to {high} dB (published 29.7; 26 to 32 for photos that are not enlarged)"
    results.append(check("DC-AE, round trip", expected, round_trip, p, 26, high))
    results.append(check("latents, standard deviation", "0.7 to 1.3", spread, p))
    expected = "under 1 (of a network that answers 0: 2)"
    for i, sigma in enumerate(SIGMAS):
        results.append(check(f"flow loss, sigma {sigma}", expected, true_captions, p, i))
    expected = "no better than true captions, and they under 1"
    for name in ("empty caption", "no instruction"):
        results.append(check(f"flow loss, {name}", expected, no_better, p, name))
    expected = f"under 1, 0.5 to 1.5; to be looked at: {p.captions[0]}"
    for sampler in SAMPLERS:
        results.append(check(f"picture, {sampler}", expected, picture, p, sampler, out))
    expected = "difference 0, under 1"
    results.append(check("untrained restorer and text-to-image", expected, projection, p))
    return results


def main():
    parser = Parser(__doc__, usage="python tests/published.py [flags]")
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--model", default="sana1.5-1.6b", help="short name, hub id, or folder in the hub's layout")
    add("--device", type=check_device, default=default, help="default: cuda if there is one")
    add("--photos", metavar="CSV", help="four photos with captions (default: scikit-image's)")
    add("--size", type=between(int, 64), default=1024, help="side of the photos (default 1024)")
    add("--out", default="out/published", help="where the pictures go (default out/published)")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    photos = own_photos(args.photos, args.size) if args.photos else bundled_photos(args.size)
    pixels, captions, enlarged = photos
    folder = resolve_model(args.model)
    results = check_model(Published(folder, pixels, captions, args.device), enlarged, out)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the training process needs the memory
    expected = "finite, mean loss under 1.5 (of a network that answers 0: 2)"
    name = f"{TRAINING_STEPS} training steps"
    results.append(check(name, expected, training, folder, pixels, args.device, out))
    print(f"{results.count(False)} of {len(results)} parts are off")
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
