"""The feature extractor of the digits demo: a small convolutional classifier whose weights travel with the package.

Trained on all 1,797 digits of scikit-learn (8x8 pixels), so that the demo and the tests need no download. Accuracy in
5-fold cross-validation, each fold trained by the same recipe: 0.994. The folds mix writers, so a new writer will be
read somewhat worse. Source of the figure and of the weights: `python -m imbdiff.evaluation.classifier`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbdiff.errors import InputError

WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")
WEIGHTS_SHA256 = "af648690858320ac55dfd9dbef8124fd9db8b7db2c7fd9d70bb121896b0c8722"


@dataclass(frozen=True)
class Recipe:
    """How the weights were trained. It travels in the metadata of the weights file."""

    data: str = "scikit-learn digits, all 1797, uint8 round(v * 255 / 16)"
    augmentation: str = "shift by -1, 0 or 1 pixel along each axis, zeros move in"
    optimizer: str = "AdamW, learning rate up over the first fifth and down to 0, both linear"
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    label_smoothing: float = 0.05
    batch: int = 64
    epochs: int = 40
    seed: int = 0


class DigitsClassifier(nn.Module):
    """uint8 [N, 1, 8, 8] -> features [N, 64]; `logits` gives [N, 10]. 75,674 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.conv2, self.norm2 = nn.Conv2d(32, 48, 3, padding=1), nn.GroupNorm(4, 48)
        self.conv3, self.norm3 = nn.Conv2d(48, 64, 3, padding=1), nn.GroupNorm(4, 64)
        self.hidden = nn.Linear(64 * 8, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise InputError(
                f"the digits classifier reads one-channel 8x8 images, got {tuple(images.shape[1:])}; "
                "name an extractor of your own: path/file.py:function"
            )
        x = images.float() / 127.5 - 1
        x = F.gelu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.gelu(self.norm2(self.conv2(x))), 2)
        x = F.gelu(self.norm3(self.conv3(x)))
        # Pooled over columns only: 512 inputs of the dense layer are enough, and rows tell 6 from 9.
        x = F.max_pool2d(x, (1, 2)).flatten(1)
        # GELU, not ReLU: dead units would make the covariance of the features singular.
        return F.gelu(self.hidden(x))

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self(images))


def load_classifier(path: Path = WEIGHTS) -> DigitsClassifier:
    """The trained classifier, after its file was checked against `WEIGHTS_SHA256`."""
    from safetensors.torch import load

    if not path.is_file():
        raise InputError(f"expected the digits classifier at {path}, found no file; install imbdiff again")
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != WEIGHTS_SHA256:
        raise InputError(
            f"{path} should have SHA-256 {WEIGHTS_SHA256}, has {found}; features of other weights "
            "do not compare; install imbdiff again"
        )
    model = DigitsClassifier()
    model.load_state_dict(load(raw))
    return model.eval().requires_grad_(False)


def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn: uint8 [1797, 1, 8, 8], labels int64 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn, which is missing: pip install 'imbdiff[demo]'") from error
    data = load_digits()
    images = (torch.from_numpy(data.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target).long()


def train_classifier(seed: int = 0, images: Tensor | None = None, labels: Tensor | None = None) -> DigitsClassifier:
    """A classifier trained by `Recipe`, on all digits unless images [N, 1, 8, 8] and labels [N] are given."""
    if images is None or labels is None:
        images, labels = digits()
    recipe, n = Recipe(), len(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsClassifier()
    steps = -(-n // recipe.batch) * recipe.epochs
    rise = -(-steps // 5)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise))
    )
    generator = torch.Generator().manual_seed(seed)
    padded, cells = F.pad(images, (1, 1, 1, 1)), torch.arange(8)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(n, generator=generator).split(recipe.batch):
            down, right = torch.randint(3, (2, len(rows), 1, 1), generator=generator)
            shifted = padded[rows[:, None, None], 0, down + cells[:, None], right + cells][:, None]
            loss = F.cross_entropy(model.logits(shifted), labels[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def cross_validate(seed: int = 0, folds: int = 5) -> list[float]:
    """Accuracy on each held-out fold; folds are stratified and shuffled."""
    from sklearn.model_selection import StratifiedKFold

    images, labels = digits()
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    scores = []
    for train, test in splits:
        model = train_classifier(seed, images[train], labels[train])
        scores.append(float((model.logits(images[test]).argmax(1) == labels[test]).double().mean()))
        print(f"fold {len(scores)}: {scores[-1]:.4f}", flush=True)
    return scores


def save_classifier(model: DigitsClassifier, path: Path, seed: int = 0) -> str:
    """Writes the weights as safetensors and returns the file's SHA-256."""
    from safetensors.torch import save

    # One metadata key: with several their order in the file, and so the hash, would vary from run to run.
    raw = save(model.state_dict(), {"recipe": json.dumps(asdict(Recipe(seed=seed)), sort_keys=True)})
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Cross-validate and train the digits classifier.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="train on all digits and write the weights here")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last digits of the weights, depends on it
    scores = cross_validate(arguments.seed)
    print(f"cross-validated accuracy: {sum(scores) / len(scores):.4f}")
    if arguments.write:
        digest = save_classifier(train_classifier(arguments.seed), arguments.write, arguments.seed)
        print(f"{arguments.write}: SHA-256 {digest}; the constant WEIGHTS_SHA256 must say the same")


if __name__ == "__main__":
    main()
