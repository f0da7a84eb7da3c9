"""Metrics that need a network or a package beyond the method's own. Each is loaded from local files or the user's hub cache,
never over the net; where it is not at hand it gives no figure, but a reason."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import AutoModel, CLIPModel, CLIPTokenizer, ImageProcessingMixin

from ..errors import InputError
from ..geometry import Box, resize, resize_mask
from ..imageio import to_bytes
from ..model import quiet, read_part
from ..pipeline import grow
from ..postprocessing import MatchedRegion
from ..reference_encoding import segment
from .dataset import Item
from .methods import Outcome
from .methods.opencv import opencv

FIGURES = {
    "lpips": ("LPIPS", False), "clip_i": ("CLIP-I", True), "dino_i": ("DINO-I", True), "clip_t": ("CLIP-T", True),
    "kgain": ("KGain", True), "ocr_agreement": ("OCR", True),
}  # fmt: skip
"""Of the judges, by name: heading, and whether higher is better."""
FILL = 0.5
"""Grey level around what CLIP-I and DINO-I compare."""
CLIP, DINO, ALEXNET = "openai/clip-vit-base-patch32", "facebook/dino-vits16", "alexnet-owt-7be5be79.pth"
DINO_KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
RATIO = 0.8
"""Of a keypoint's distances to its nearest and its second (Lowe 2004)."""
SURE, SHORTEST = 0.7, 2
"""What a line of text must reach to count as read, and characters that the reference must show."""
INSTALL = 'pip install "refine-by-align[judges]"'


class Judge(Protocol):
    """Figures of one outcome by name, of FIGURES or other counts; none where the judge has nothing to say of the item.

    about   network, crop and fill, for whoever reads the figures
    """

    about: str

    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]: ...


def load_judges(wanted: Mapping[str, str | None], device: str | torch.device = "cpu") -> tuple[dict[str, Judge], dict[str, str]]:
    """The judges that are at hand, and of the others why they are not, by name.

    wanted   names of JUDGES, each with where its weights lie, see there; `None` = its usual place

    Raises `InputError` for an unknown name only.
    """
    if unknown := [name for name in wanted if name not in JUDGES]:
        raise InputError("judges", f"{unknown[0]!r} is not known", f"use some of {', '.join(JUDGES)}")
    ready, unavailable = {}, {}
    for name, source in wanted.items():
        try:
            ready[name] = JUDGES[name](source, device)
        except InputError as error:
            unavailable[name] = f"{error.problem}; {error.remedy}"
    return ready, unavailable


def parse_judges(text: str) -> dict[str, str | None]:
    """`"kgain,clip=FOLDER"` -> `{"kgain": None, "clip": "FOLDER"}`"""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return {name: source or None for name, _, source in parts}


class Clip:
    """CLIP-I: cosine of the embeddings of what the mask covers in the result and of M_gt's region of the reference, the whole
    object where the item has no M_gt; each cut to its box and padded to a square, FILL around it (`matched_pair`).
    CLIP-T: cosine of the embeddings of the whole result, its shorter side resized and its middle square taken, and of the
    caption, where the item has one. -1 to 1.

    source   folder of a `CLIPModel` with its tokenizer, or a repository in the hub's cache
    """

    def __init__(self, source: str | None, device: str | torch.device):
        source = source or CLIP
        with reading("clip", source, "a CLIPModel's folder"):
            self.pixels = Pixels(source, device)
            self.tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=True)
            self.network = read_part(CLIPModel, source).to(device).eval()
        self.about = f"CLIP-I, CLIP-T: {named(source)}; CLIP-I of the masked part and M_gt's region (else the object), grey {FILL:g} around; CLIP-T of the whole result"

    @torch.no_grad()
    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]:
        figures = {"clip_i": cosine(*self.embed([self.pixels.whole(picture) for picture in matched_pair(item, outcome)]))}
        if item.caption is not None:
            text = self.network.text_model(**self.tokenizer(item.caption, truncation=True, return_tensors="pt").to(self.network.device)).pooler_output
            figures["clip_t"] = cosine(self.embed([self.pixels.middle(outcome.image)])[0], self.network.text_projection(text)[0])
        return figures

    def embed(self, pictures: list[Tensor]) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixel_values=torch.stack(pictures)).pooler_output)


class Dino:
    """DINO-I: as CLIP-I, of DINO's or DINOv2's class tokens (Caron et al. 2021; ViT-S/16 is what the field reports).

    source   folder of a `ViTModel` or `Dinov2Model`, or a repository in the hub's cache
    """

    def __init__(self, source: str | None, device: str | torch.device):
        source = source or DINO
        with reading("dino", source, "a DINO's or DINOv2's folder"):
            self.pixels = Pixels(source, device)
            self.network = read_part(AutoModel, source, unused=("pooler.",)).to(device).eval()
            if self.network.config.model_type not in DINO_KINDS:
                raise ValueError(f"it is a {self.network.config.model_type}")
        self.about = f"DINO-I: {named(source)} ({self.network.config.model_type}), class token; of the masked part and M_gt's region (else the object), grey {FILL:g} around"

    @torch.no_grad()
    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]:
        pictures = torch.stack([self.pixels.whole(picture) for picture in matched_pair(item, outcome)])
        return {"dino_i": cosine(*self.network(pixel_values=pictures).last_hidden_state[:, 0])}


class Lpips:
    """LPIPS (Zhang et al. 2018, AlexNet, version 0.1) of result and truth: the map over the mask's box grown by half, its shorter
    side enlarged to 64 px where it is less, beyond the picture its border repeated; mean over the mask. 0 = alike.

    source   torchvision's AlexNet weights; default: in torch hub's cache. The linear layers come with the package
    """

    def __init__(self, source: str | None, device: str | torch.device):
        try:
            import lpips
        except ImportError as error:
            raise InputError("judges", "lpips needs the package lpips", INSTALL) from error
        path = Path(source) if source else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
        with reading("lpips", path, f"torchvision's {ALEXNET}"), warnings.catch_warnings(action="ignore"):  # of arguments that the package uses
            weights = torch.load(path, map_location="cpu", weights_only=True)
            self.network = lpips.LPIPS(net="alex", pnet_rand=True, spatial=True, verbose=False)  # random until the next lines: the package would download
            trunk = self.network.net
            trunk.load_state_dict({name: weights[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()})
        self.network.to(device).eval()
        self.device = device
        self.about = f"LPIPS: AlexNet {path.name}, v0.1; over the mask's box grown by half, at least 64 px, mean over the mask"

    @torch.no_grad()
    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]:
        if item.truth is None:
            return {}
        box = grown(item.mask, 0.5)
        result, truth = (enlarged(box.crop(picture), 64) for picture in (outcome.image, item.truth))
        mask = resize_mask(box.crop(item.mask[None], fill=0.0)[0], *truth.shape[-2:])
        distance = self.network(result[None].to(self.device), truth[None].to(self.device), normalize=True)[0, 0].cpu()
        return {"lpips": float(distance[mask > 0.5].mean())}


class KGain:
    """Whether refining raised the number of keypoint matches to the reference, 1 or 0, so that the mean is the share of items
    (KGain, after FlowFixer). Keypoints: SIFT in a square of twice the mask's longer side around it, and on the reference's object.
    A match: each is the other's nearest, and nearer than 0.8 times the second. Where the item has M_gt, only matches from under
    the mask into M_gt's region, grown by a tenth, count: any new texture finds some match somewhere. Wrong letters that share
    strokes with the right ones still have a few.

    Says nothing where the reference has no keypoints. `keypoint_matches` and `keypoint_matches_before` are the two numbers.
    """

    about = "KGain: SIFT, mutual nearest, ratio 0.8; matches from under the mask into M_gt's region grown by a tenth (else from a square of twice the mask's longer side to the object)"

    def __init__(self, source: str | None, device: str | torch.device):
        if source:
            raise InputError("judges", f"kgain has no weights to read from {source}", "write kgain alone")
        self.cv2, self.item = opencv("kgain"), None
        self.sift = self.cv2.SIFT_create()

    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]:
        if item is not self.item:
            self._remember(item)
        if self.reference is None or len(self.reference) < 2:
            return {}
        after = self._matches(outcome.image)
        return {"kgain": float(after > self.before), "keypoint_matches": after, "keypoint_matches_before": self.before}

    def _remember(self, item: Item) -> None:
        box = Box.around(item.mask)
        around = box.square(2 * max(box.width, box.height))
        self.item, self.near = item, around.paste(torch.zeros(1, *item.mask.shape), torch.ones(1, around.height, around.width))[0]
        self.here, there = self.near, item.object_mask
        if item.correspondence is not None:
            self.here, there = item.mask, grow(MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), 0.1)
        points, self.reference = self._keypoints(item.reference, item.object_mask)
        self.hit = selected(there, points)
        self.before = self._matches(item.image)

    def _keypoints(self, picture: Tensor, mask: Tensor):
        return self.sift.detectAndCompute(to_bytes(picture), np.uint8(mask.numpy() > 0.5))

    def _matches(self, image: Tensor) -> int:
        points, found = self._keypoints(image, self.near)
        if found is None or self.reference is None:
            return 0
        matcher = self.cv2.BFMatcher()
        back = {match.queryIdx: match.trainIdx for match in matcher.match(self.reference, found)}
        pairs = [best for best, *second in matcher.knnMatch(found, self.reference, k=2) if second and best.distance < RATIO * second[0].distance]
        here = selected(self.here, points)
        return sum(back[pair.trainIdx] == pair.queryIdx and here[pair.queryIdx] and self.hit[pair.trainIdx] for pair in pairs)


class Ocr:
    """Agreement of the text read in the mask's box of the result and in that of M_gt's region of the reference: 1 less the
    Levenshtein distance as a share of the longer text, case and spaces left out; 0 to 1.

    Each box is grown by a tenth, so that letters at its border are whole, what lies outside the mask left as it is, and its
    shorter side enlarged to 128 px where it is less. Lines that RapidOCR is less sure of than 0.7 count as not read. Says nothing
    where the item has no M_gt, or fewer than two characters are read there.

    source   folder with RapidOCR's detector, classifier and recogniser as .onnx; default: those that come with the package
    """

    def __init__(self, source: str | None, device: str | torch.device):
        try:
            import rapidocr
            from rapidfuzz.distance import Levenshtein
        except ImportError as error:
            raise InputError("judges", f"ocr needs the package {error.name}", INSTALL) from error
        folder = Path(source) if source else Path(rapidocr.__file__).parent / "models"
        models = {stage: sorted(folder.glob(f"*_{stage}_*.onnx")) for stage in ("det", "cls", "rec")}
        for stage, found in models.items():
            if len(found) != 1:  # without a file of its own the package would download one
                raise InputError("judges", f"{folder} has {len(found)} files *_{stage}_*.onnx", "give ocr=FOLDER with one of each of det, cls and rec")
        settings = {f"{stage.capitalize()}.model_path": str(found[0]) for stage, found in models.items()}
        settings |= {"Det.limit_side_len": 256, "Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
        self.similarity, self.item = Levenshtein.normalized_similarity, None
        with reading("ocr", folder, "a folder of RapidOCR's models"):
            self.engine = rapidocr.RapidOCR(params=settings)
            if (text := self.read(*printed("Refine"))) != "refine":  # also the first time that the models are opened
                raise ValueError(f"reads {text!r} where Refine is printed")
        self.about = f"OCR: {models['rec'][0].stem}; boxes of the mask and of M_gt's region grown by a tenth, at least 128 px, lines from confidence {SURE:g}"

    def __call__(self, item: Item, outcome: Outcome) -> dict[str, float]:
        if item.correspondence is None:
            return {}
        if item is not self.item:
            self.item, self.text = item, self.read(item.reference, item.correspondence)
        return {"ocr_agreement": self.similarity(self.text, self.read(outcome.image, item.mask))} if len(self.text) >= SHORTEST else {}

    def read(self, picture: Tensor, mask: Tensor) -> str:
        """The text in the mask's box, line by line from the top, in lower case without spaces."""
        seen = to_bytes(enlarged(grown(mask, 0.1).crop(picture), 128))[..., ::-1]
        lines = self.engine(np.ascontiguousarray(seen))
        return "".join("".join(text.split()) for text, sure in zip(lines.txts or (), lines.scores or ()) if sure >= SURE).casefold()


JUDGES = {"clip": Clip, "dino": Dino, "lpips": Lpips, "kgain": KGain, "ocr": Ocr}


class Pixels:
    """Pictures as a network takes them: side, mean and deviation as its preprocessor_config.json has them."""

    def __init__(self, source: str, device: str | torch.device):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)
        side = settings.get("crop_size") or settings["size"]
        self.side = side if isinstance(side, int) else side.get("height") or side["shortest_edge"]
        self.mean, self.deviation = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.device = device

    def whole(self, square: Tensor) -> Tensor:
        """`[3, S, S]` in [0, 1], nothing cut off -> `[3, side, side]`"""
        return ((resize(square, self.side, self.side) - self.mean) / self.deviation).to(self.device)

    def middle(self, picture: Tensor) -> Tensor:
        """`[3, H, W]` in [0, 1] -> `[3, side, side]`, shorter side resized, the middle taken, as CLIP is used."""
        height, width = (round(extent * self.side / min(picture.shape[-2:])) for extent in picture.shape[-2:])
        return self.whole(Box(0, 0, width, height).square(self.side).crop(resize(picture, height, width)))


def matched_region(item: Item) -> Tensor:
    """M_gt, or all of the object where the item has none; never a method's own M*."""
    return item.object_mask if item.correspondence is None else item.correspondence


def matched_pair(item: Item, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Two squares `[3, S, S]`: what the mask covers in the result, and the matched region of the reference; FILL around each."""
    return segment(outcome.image, item.mask, FILL)[0], segment(item.reference, matched_region(item), FILL)[0]


def printed(word: str) -> tuple[Tensor, Tensor]:
    """A word in black on white `[3, 60, 200]`, and a mask of it all."""
    picture = Image.new("RGB", (200, 60), "white")
    ImageDraw.Draw(picture).text((20, 8), word, fill="black", font=ImageFont.load_default(36))
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255, torch.ones(60, 200)


def selected(mask: Tensor, keypoints) -> list[bool]:
    """Of OpenCV's keypoints, which lie on a mask. OpenCV counts from a pixel's centre."""
    height, width = mask.shape
    return [bool(mask[min(round(y), height - 1), min(round(x), width - 1)] > 0.5) for x, y in (keypoint.pt for keypoint in keypoints)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.float(), b.float(), dim=0))


def grown(mask: Tensor, share: float) -> Box:
    """The box around a mask, each side longer by `share`."""
    box = Box.around(mask)
    width, height = round(box.width * (1 + share)), round(box.height * (1 + share))
    return Box(box.x - (width - box.width) // 2, box.y - (height - box.height) // 2, width, height)


def enlarged(picture: Tensor, shorter: int) -> Tensor:
    """`[3, H, W]` with its shorter side at least that long, pixels."""
    scale = max(1.0, shorter / min(picture.shape[-2:]))
    return resize(picture, *(round(extent * scale) for extent in picture.shape[-2:]))


def named(source: str) -> str:
    return Path(source).resolve().name if Path(source).is_dir() else source


@contextmanager
def reading(name: str, source: str | Path, what: str):
    """Whatever goes wrong while weights are read, in one line."""
    try:
        with quiet():
            yield
    except Exception as error:  # each library has its own kinds
        problem = f"cannot be read ({' '.join(str(error).split())[:200]})" if Path(source).exists() else "is neither on this disk nor whole in the hub's cache"
        raise InputError("judges", f"{source} {problem}", f"give {name}=PATH, {what}") from error
