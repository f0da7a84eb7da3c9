import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rba_core.bench import judges
from rba_core.bench import run as bench
from rba_core.bench.dataset import Item
from rba_core.bench.judges import load_judges
from rba_core.bench.methods import Outcome
from rba_core.errors import InputError

SIDE = 32
CLIP_MEAN, CLIP_STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIPModel's folder as the hub has it: a small network, a tokenizer of single letters, and its preprocessing."""
    folder = tmp_path_factory.mktemp("networks") / "small-clip"
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": SIDE, "crop_size": SIDE, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"image_size": SIDE, "patch_size": 8}, projection_dim=12)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["vit", "dinov2"])
def dino(request, tmp_path_factory):
    """A DINO's folder, which has no pooler, and a DINOv2's, which was trained at another size and asks for its middle to be cut out."""
    folder = tmp_path_factory.mktemp("networks") / f"small-{request.param}"
    torch.manual_seed(1)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    if request.param == "vit":
        ViTModel(ViTConfig(**small, image_size=SIDE), add_pooling_layer=False).save_pretrained(folder)
        size = {"size": SIDE}
    else:
        Dinov2Model(Dinov2Config(**small, image_size=56)).save_pretrained(folder)
        size = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size | {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}))
    return folder


@pytest.fixture
def item() -> Item:
    """Noise; the masked part and M_gt's region fit a square of 32 px, so that nothing is resampled."""
    generator = torch.Generator().manual_seed(2)
    image, truth, reference = (torch.rand(3, height, width, generator=generator) for height, width in ((64, 80), (64, 80), (70, 60)))
    mask, region, whole = torch.zeros(64, 80), torch.zeros(70, 60), torch.zeros(70, 60)
    mask[10:42, 20:44] = 1  # 24 x 32
    mask[10:14, 20:24] = 0
    region[30:54, 15:47] = 1  # 32 x 24
    whole[5:65, 5:55] = 1
    truth = torch.where(mask > 0.5, truth, image)
    return Item("0", "customization", {}, image, mask, reference, whole, region, truth, caption="a can")


def squares(item: Item, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What CLIP-I and DINO-I compare, cut out by hand."""
    part, matched = np.full((2, 3, 32, 32), 0.5, np.float32)
    inside = item.mask[10:42, 20:44].numpy() > 0.5
    part[:, :, 4:28][:, inside] = image[:, 10:42, 20:44].numpy()[:, inside]
    matched[:, 4:28] = item.reference[:, 30:54, 15:47].numpy()
    return part, matched


def normalised(picture: np.ndarray, mean, std) -> Tensor:
    return torch.from_numpy((picture - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))).float()[None]


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().numpy().ravel(), b.detach().double().numpy().ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def judge(name: str, source=None):
    ready, unavailable = load_judges({name: source and str(source)})
    assert not unavailable
    return ready[name]


def test_clip_agrees_with_cosines_of_its_own_embeddings(clip, item):
    figures = judge("clip", clip)(item, Outcome(item.truth))
    network = CLIPModel.from_pretrained(clip, local_files_only=True).eval()
    middle = normalised(halved(item.truth)[:, :, 4:36], CLIP_MEAN, CLIP_STD)
    tokens = [52, 26, 2, 0, 39, 53]  # start, "a" that ends a word, "c", "a", "n" that ends a word, end
    embed = [network(input_ids=torch.tensor([tokens]), pixel_values=normalised(square, CLIP_MEAN, CLIP_STD)) for square in squares(item, item.truth)]
    assert figures["clip_i"] == pytest.approx(cosine(*(one.image_embeds for one in embed)), abs=1e-5)
    whole = network(input_ids=torch.tensor([tokens]), pixel_values=middle)
    assert figures["clip_t"] == pytest.approx(cosine(whole.image_embeds, whole.text_embeds), abs=1e-4)
    assert figures["clip_i"] != pytest.approx(judge("clip", clip)(item, Outcome(item.image))["clip_i"], abs=1e-4)


def halved(picture: Tensor) -> np.ndarray:
    height, width = picture.shape[-2:]
    bands = [Image.fromarray(band.numpy()).resize((width // 2, height // 2), Image.Resampling.BICUBIC) for band in picture]
    return np.stack([np.asarray(band) for band in bands]).clip(0, 1)


def test_dino_agrees_with_the_cosine_of_its_own_class_tokens(dino, item):
    ours = judge("dino", dino)
    network = (ViTModel if "vit" in dino.name else Dinov2Model).from_pretrained(dino, local_files_only=True).eval()
    tokens = [network(normalised(square, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[0, 0] for square in squares(item, item.truth)]
    assert ours(item, Outcome(item.truth)) == {"dino_i": pytest.approx(cosine(*tokens), abs=1e-5)}
    assert dino.name in ours.about and "grey 0.5" in ours.about


def test_what_lies_outside_mask_and_region_does_not_count(clip, dino, item):
    """Except to CLIP-T, which looks at all of the result."""
    changed = torch.where(item.mask > 0.5, item.image, 1 - item.image)
    other = Item("1", item.task, {}, item.image, item.mask, torch.where(item.correspondence > 0.5, item.reference, 0), item.reference_mask, item.correspondence, caption="a can")
    for network in (judge("clip", clip), judge("dino", dino)):
        before, after, elsewhere = network(item, Outcome(item.image)), network(item, Outcome(changed)), network(other, Outcome(item.image))
        assert {name for name in before if before[name] != after[name]} == {"clip_t"} & set(before)
        assert before == elsewhere


def test_without_m_gt_the_whole_object_is_compared_and_without_a_caption_no_text(clip, item):
    bare = Item(item.id, item.task, {}, item.image, item.mask, item.reference, item.reference_mask)
    whole = Item(item.id, item.task, {}, item.image, item.mask, item.reference, None, item.reference_mask)
    ours = judge("clip", clip)
    assert ours(bare, Outcome(item.image)) == ours(whole, Outcome(item.image)) != {"clip_i": ours(item, Outcome(item.image))["clip_i"]}
    assert set(ours(bare, Outcome(item.image))) == {"clip_i"}


def test_the_same_content_is_as_alike_as_can_be(clip, dino, item):
    same = Item(item.id, item.task, {}, item.image, item.mask, item.truth, None, item.mask)
    for network, name in ((judge("clip", clip), "clip_i"), (judge("dino", dino), "dino_i")):
        assert network(same, Outcome(item.truth))[name] == pytest.approx(1, abs=1e-5)
        assert network(same, Outcome(item.image))[name] < 0.9999


@pytest.mark.parametrize("name", ["clip", "dino", "lpips", "ocr"])
def test_absent_weights_give_a_reason_and_no_figure(name, small_set, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        ready, unavailable = load_judges({name: str(source)})
        assert ready == {} and set(unavailable) == {name}
        assert str(source) in unavailable[name] or "needs the package" in unavailable[name]
        assert "\n" not in unavailable[name]


def test_weights_that_lack_a_part_are_not_made_up(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights" in load_judges({"clip": str(tmp_path)})[1]["clip"]
    assert "it is a clip" in load_judges({"dino": str(clip)})[1]["dino"]


def test_unknown_names():
    with pytest.raises(InputError, match="'taste' is not known"):
        load_judges({"taste": None})
    assert "write kgain alone" in load_judges({"kgain": "weights"})[1]["kgain"]
    assert judges.parse_judges("kgain, clip=/some/folder,") == {"kgain": None, "clip": "/some/folder"}
    assert judges.parse_judges("") == {}


def printed(text: str, seed: int = 0) -> Tensor:
    """A line of print `[3, 120, 320]` with a little grain."""
    picture = Image.new("RGB", (320, 120), (230, 220, 200))
    ImageDraw.Draw(picture).text((30, 35), text, fill=(20, 30, 90), font=ImageFont.load_default(46))
    grain = np.random.default_rng(seed).normal(0, 0.01, (120, 320, 1))
    return torch.from_numpy((np.asarray(picture) / 255 + grain).clip(0, 1)).movedim(-1, 0).float()


@pytest.fixture
def label() -> Item:
    """A word whose second half is smeared; the reference shows it a little larger."""
    truth = printed("COFFEE 47")
    mask = torch.zeros(120, 320)
    mask[30:95, 150:280] = 1
    smeared = F.avg_pool2d(truth[None], (1, 41), 1, (0, 20))[0]
    larger = F.interpolate(printed("COFFEE 47", 1)[None], scale_factor=1.2, mode="bicubic")[0].clamp(0, 1)
    region = F.interpolate(mask[None, None], larger.shape[-2:])[0, 0]
    return Item("0", "customization", {}, torch.where(mask > 0.5, smeared, truth), mask, larger, None, region, truth)


def test_kgain_counts_matches_regained(label):
    """The artifact is another word; letters have strokes in common, so it has a few matches, too."""
    pytest.importorskip("cv2", reason="KGain needs OpenCV")
    ours = judge("kgain")
    letters = torch.where(label.mask > 0.5, printed("BXQVKM 3Z"), label.truth)
    garbled = Item("0", label.task, {}, letters, label.mask, label.reference, None, label.correspondence)
    noise = torch.where(label.mask > 0.5, torch.rand(120, 320, generator=torch.Generator().manual_seed(7)), label.truth)
    restored, *others = (ours(garbled, Outcome(image)) for image in (label.truth, noise, label.image, letters))
    assert restored["kgain"] == 1 and restored["keypoint_matches"] > 10 > restored["keypoint_matches_before"] > 0
    assert [other["kgain"] for other in others] == [0, 0, 0]
    assert others[-1]["keypoint_matches"] == restored["keypoint_matches_before"]
    blank = Item("1", label.task, {}, label.image, label.mask, torch.full_like(label.reference, 0.5))
    assert ours(blank, Outcome(label.truth)) == {}


@pytest.mark.parametrize("with_region", [True, False], ids=["M_gt", "no M_gt"])
def test_kgain_counts_mutual_matches_that_are_nearer_than_the_next(label, with_region):
    """From under the mask into M_gt's region, or else from around the mask into the object."""
    cv2 = pytest.importorskip("cv2", reason="KGain needs OpenCV")
    whole = torch.zeros(label.reference.shape[-2:])
    whole[:, :330] = 1
    item = Item("0", label.task, {}, label.image, label.mask, label.reference, whole, label.correspondence if with_region else None)
    ours = judge("kgain")(item, Outcome(label.truth))["keypoint_matches"]

    def keypoints(picture, selection):
        points, descriptors = cv2.SIFT_create().detectAndCompute(np.uint8(picture.movedim(0, -1).numpy() * 255 + 0.5), np.uint8(selection))
        return np.array([point.pt for point in points]), descriptors

    square = np.zeros((120, 320))
    square[:, 85:] = 1  # of 260 px around the mask's middle at (215, 62)
    (here, found), (there, known) = keypoints(label.truth, square), keypoints(label.reference, whole.numpy())
    distance = np.linalg.norm(found[:, None] - known[None], axis=-1)
    nearest, second = np.sort(distance, 1)[:, :2].T
    partner = distance.argmin(1)
    counted = (distance.argmin(0)[partner] == np.arange(len(found))) & (nearest < 0.8 * second)
    if with_region:
        (x, y), (u, v) = here.T, there[partner].T
        top, left, bottom, right = 36, 180, 114, 336
        reach = 0.1 * (right - left)
        counted &= (150 <= x + 0.5) & (x + 0.5 < 280) & (30 <= y + 0.5) & (y + 0.5 < 95)
        counted &= np.hypot((left - u - 0.5).clip(0) + (u + 0.5 - right).clip(0), (top - v - 0.5).clip(0) + (v + 0.5 - bottom).clip(0)) < reach
    assert ours == counted.sum() > 5


def test_ocr_reads_what_was_restored(label):
    pytest.importorskip("rapidocr", reason="OCR needs rapidocr, onnxruntime and rapidfuzz")
    pytest.importorskip("rapidfuzz", reason="OCR needs rapidfuzz")
    ours = judge("ocr")
    assert ours(label, Outcome(label.truth)) == {"ocr_agreement": 1}
    assert ours.text == "ee47"
    assert ours(label, Outcome(label.image))["ocr_agreement"] < 0.5
    other = torch.where(label.mask > 0.5, printed("COFFEE 17"), label.truth)
    assert ours(label, Outcome(other)) == {"ocr_agreement": pytest.approx(0.75)}
    blank = Item("1", label.task, {}, label.image, label.mask, torch.full_like(label.reference, 0.5), None, label.correspondence)
    assert ours(blank, Outcome(label.truth)) == {}
    assert ours(Item("2", label.task, {}, label.image, label.mask, label.reference), Outcome(label.truth)) == {}


def test_ocr_wants_one_model_of_each_kind(tmp_path):
    pytest.importorskip("rapidocr", reason="OCR needs rapidocr, onnxruntime and rapidfuzz")
    pytest.importorskip("rapidfuzz", reason="OCR needs rapidfuzz")
    assert "has 0 files *_det_*.onnx" in load_judges({"ocr": str(tmp_path)})[1]["ocr"]
    for stage in ("det", "cls", "rec"):
        (tmp_path / f"small_{stage}_1.onnx").write_bytes(b"not a network")
    assert "cannot be read" in load_judges({"ocr": str(tmp_path)})[1]["ocr"]


@pytest.fixture
def alexnet(tmp_path):
    """Random weights in the layout of torchvision's AlexNet."""
    generator = torch.Generator().manual_seed(3)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    weights = {}
    for place, shape in shapes.items():
        weights[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        weights[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    torch.save(weights | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth", weights


def test_lpips_agrees_with_its_formula(alexnet, item):
    """Zhang et al. 2018, Eq. 1, over a box of 36 x 48 px brought to 64 x 85, before its mean is taken."""
    lpips = pytest.importorskip("lpips", reason="LPIPS needs lpips and torchvision")
    path, weights = alexnet
    linear = torch.load(f"{lpips.__path__[0]}/weights/v0.1/alex.pth", map_location="cpu", weights_only=True)

    def features(picture):
        x = (picture * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        for number, (place, stride, padding) in enumerate(((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))):
            if number in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], stride, padding).relu()
            yield x / x.norm(dim=1, keepdim=True)

    def cut(picture):
        """Rows 2 to 50, columns 14 to 50."""
        return F.interpolate(picture[None, :, 2:50, 14:50], (85, 64), mode="bicubic", antialias=True).clamp(0, 1)

    maps = [
        F.interpolate((linear[f"lin{number}.model.1.weight"] * (a - b) ** 2).sum(1, keepdim=True), (85, 64), mode="bilinear", align_corners=False)
        for number, (a, b) in enumerate(zip(features(cut(item.image)), features(cut(item.truth))))
    ]
    inside = F.interpolate(item.mask[None, None, 2:50, 14:50], (85, 64), mode="bilinear", antialias=True)[0, 0] >= 0.5
    ours = judge("lpips", path)
    assert ours(item, Outcome(item.image)) == {"lpips": pytest.approx(float(sum(maps)[0, 0][inside].mean()), rel=1e-4)}
    assert ours(item, Outcome(item.truth)) == {"lpips": pytest.approx(0, abs=1e-9)}
    far = item.truth.clone()
    far[:, :, 60:] = 0
    assert ours(item, Outcome(far)) == {"lpips": pytest.approx(0, abs=1e-9)}
    assert ours(Item("1", item.task, {}, item.image, item.mask, item.reference), Outcome(item.image)) == {}


def test_lpips_without_weights_says_so(tmp_path, monkeypatch):
    pytest.importorskip("lpips", reason="LPIPS needs lpips and torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    assert "alexnet-owt-7be5be79.pth is neither on this disk" in load_judges({"lpips": None})[1]["lpips"]
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"cut short")
    assert "cannot be read" in load_judges({"lpips": None})[1]["lpips"]
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    assert "cannot be read" in load_judges({"lpips": str(tmp_path / "vgg16.pth")})[1]["lpips"]


def test_figures_reach_the_report_by_method(small_set, clip, tmp_path):
    methods = {"none": lambda item, model, seed: Outcome(item.image), "telea": lambda item, model, seed: Outcome(item.truth)}
    report = bench.run(small_set, methods, None, tmp_path / "judged", load_judges({"clip": str(clip), "kgain": None})[0])
    rows = [row for row in report["items"] if row["method"] == "telea"]
    assert report["methods"]["telea"]["clip_i"] == pytest.approx(sum(row["clip_i"] for row in rows) / 2)
    assert report["methods"]["none"]["kgain"] == 0 and "keypoint_matches" in rows[0] and "keypoint_matches" not in report["methods"]["telea"]
    assert "small-clip" in report["judges"]["clip"]
    table = bench.format_table(report).splitlines()[0].split("  ")
    assert {"CLIP-I", "KGain"} <= {cell.strip() for cell in table}
    assert json.loads(json.dumps(report)) == report
    assert not set(judges.FIGURES) & set(bench.run(small_set, methods, None, tmp_path / "not", limit=1)["items"][0])


def test_the_command_says_what_is_not_available(small_set, clip, tmp_path, capsys):
    from rba_core import cli
    from rba_core.bench.report import write_report

    command = ["bench", "run", str(small_set), "--methods", "none,telea", "-o", str(tmp_path / "out"), "--judges"]
    assert cli.main([*command, f"kgain,clip={clip},dino={tmp_path}"]) == 0
    table, unavailable = capsys.readouterr()
    assert "CLIP-I" in table and "DINO-I" not in table
    unavailable = unavailable.splitlines()[0]
    assert unavailable.startswith(f"dino: not available: {tmp_path} cannot be read (") and unavailable.endswith("give dino=PATH, a DINO's or DINOv2's folder")
    write_report([tmp_path / "out" / "small.json"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| CLIP-I |" in page and "- CLIP-I, CLIP-T: small-clip; " in page and "- dino: not available: " in page
    assert cli.main([*command, "taste"]) == 2
    assert "judges: 'taste' is not known" in capsys.readouterr().err
