"""Measure a run: a Random Forest on its latent codes, and its quality as a generative model."""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors

import data
import model


def main():
    parser = data.command_line(__doc__)
    parser.add_argument("--baselines", action="store_true", help="also try raw pixels and PCA")
    args = parser.parse_args()
    run = data.read_run(args.run)
    print(run)
    latent_dim, path = run.settings["latent_dim"], run.path / data.CLASSIFICATION
    vae = model.load_model(run)
    splits = data.load_splits(args.data, run.settings["hold_out"])
    (train_images, train_labels), (test_images, test_labels) = splits
    components = min(len(train_images), 28 * 28)
    if args.baselines and latent_dim > components:
        raise data.UserError(f"--baselines: PCA has {components} components, not {latent_dim}")

    train_mu, test_mu = (model.latent_means(vae, images) for images in (train_images, test_images))
    # In float64 PCA, like μ, is the same on every machine.
    flat_train, flat_test = (images.flatten(1).double() for images in (train_images, test_images))
    pca = PCA(min(50, components), random_state=42).fit(flat_train)
    mixture_z = model.sample_mixture(vae, train_images, len(test_images))
    metrics = measure(vae, test_images, mixture_z, pca)
    # Of the gap between train and test loss, the difference of the floors is the data's own.
    train_floor = model.reconstruction_bce(train_images, train_images) / len(train_images)
    metrics["train_bce_floor"] = train_floor.item()
    metrics["active_dimensions"] = model.active_dimensions(test_mu)

    predicted = fit_forest(train_mu, train_labels).predict(test_mu)
    matrix = confusion_matrix(test_labels, predicted, labels=range(len(data.CLASSES)))
    accuracy = matrix.trace() / matrix.sum()
    recall = matrix.diagonal() / matrix.sum(axis=1).clip(min=1)
    print("Confusion matrix: a row a true class, a column a predicted one, in the same order")
    for name, counts, share in zip(data.CLASSES, matrix, recall):
        print(f"{name:11}", *(f"{count:4}" for count in counts), f"{share * 100:6.1f}% right")
    print(f"Classification accuracy: {accuracy * 100:.2f}%")

    # They depend on no weights, so those of before stay.
    baselines = (data.read(path, data.parse_classification) or {}).get("baselines")
    if args.baselines:
        reduced = PCA(latent_dim, random_state=42).fit(flat_train)
        features = {"pixels": (flat_train, flat_test)}
        features["pca"] = [reduced.transform(split) for split in (flat_train, flat_test)]
        baselines = {}
        for name, (train, test) in features.items():
            baselines[name] = fit_forest(train, train_labels).score(test, test_labels)
            print(f"The same forest on {name}: {baselines[name] * 100:.2f}%")
        as_many = train_images[: len(test_images)]
        baselines["training_images"] = compare(as_many, test_images, pca)
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    if not metrics["active_dimensions"]:
        print("Remark: no dimension of the code is active.", file=sys.stderr)

    result = {"epoch": len(run.log), "sha256": data.digest(run.weights), "accuracy": accuracy}
    result |= {"recall": dict(zip(data.CLASSES, recall)), "confusion_matrix": matrix.tolist()}
    data.write(path, {**result, "baselines": baselines, **metrics})


def fit_forest(x, y, random_state=42):
    """Return the report's forest fitted to features x [N, D] and labels y [N]."""
    return RandomForestClassifier(100, random_state=random_state, n_jobs=-1).fit(x, y)


@torch.no_grad()
def measure(vae, images, mixture_z, pca):
    """Return what tells of reconstructions and samples, for N test images [N, 1, 28, 28].
    A reconstruction is the model's forward pass, z sampled, as in the test loss.
    - bce, kld: the two terms of the loss, in nats per image.
    - bce_floor: the BCE of a perfect reconstruction, the entropy of the grey values themselves.
    - excess_bce: bce − bce_floor.
    - mse: squared error per pixel, values in [0, 1].
    - sharpness_reconstructions: gradient energy of reconstructions over that of the images.
    - frechet, precision, recall, of `compare`: `_samples` of N from N(0, I), and
      `_mixture_samples` of `mixture_z` [N, latent_dim], each decoded."""
    torch.manual_seed(0)
    outputs = zip(*(vae(x) for x in images.split(model.BATCH)))
    reconstructions, mu, logvar = (torch.cat(parts) for parts in outputs)
    bce = model.reconstruction_bce(reconstructions, images).item() / len(images)
    bce_floor = model.reconstruction_bce(images, images).item() / len(images)
    metrics = {
        "bce": bce,
        "kld": model.kl_divergence(mu, logvar).item() / len(images),
        "bce_floor": bce_floor,
        "excess_bce": bce - bce_floor,
        "mse": F.mse_loss(reconstructions, images).item(),
        "sharpness_reconstructions": gradient_energy(reconstructions) / gradient_energy(images),
    }
    for name, z in {"samples": torch.randn_like(mu), "mixture_samples": mixture_z}.items():
        samples = torch.cat([vae.decode(part) for part in z.split(model.BATCH)])
        likeness = compare(samples, images, pca)
        metrics |= {f"{measure}_{name}": value for measure, value in likeness.items()}
    return metrics


def gradient_energy(images):
    """Return the mean over images of Σ (∂x)² + (∂y)², differences of neighbouring pixels. A measure
    of focus (Subbarao, Choi & Nikzad, 1993): blur lowers it."""
    dy, dx = images.diff(dim=2), images.diff(dim=3)
    return (dy.square().sum() + dx.square().sum()).item() / len(images)


def compare(samples, images, pca):
    """Return how like `images` [N, 1, 28, 28] `samples` [M, 1, 28, 28] are, both taken as points by
    `pca`, which was fitted to the pixels of training images. There is no Inception network in it,
    so none of the three compares with others' figures.
    - frechet: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of the Gaussians fitted to the two sets
      (Heusel et al., 2017): 0 if means and covariances agree; lower is better.
    - precision: share of samples that lie among images, that is, no farther from some image than
      its third nearest other image; recall: of images that lie among samples (Kynkäänniemi et al.,
      2019). From 0 to 1, higher is better, but blur raises precision: real images have less."""
    points = [torch.tensor(pca.transform(x.flatten(1).double())) for x in (samples, images)]
    means = [x.mean(dim=0) for x in points]
    # With centred points A = QR a covariance is RᵀR, and tr (Σ₁Σ₂)^½ the nuclear norm of R₁R₂ᵀ.
    a, b = (torch.linalg.qr(x - mean).R / (len(x) - 1) ** 0.5 for x, mean in zip(points, means))
    frechet = (means[0] - means[1]).square().sum() + (a.square().sum() + b.square().sum())
    frechet -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    precision, recall = share_among(*points), share_among(*reversed(points))
    return {"frechet": frechet.item(), "precision": precision, "recall": recall}


def share_among(points, others):
    """Return the share of `points` [N, D] as near to one of `others` as its third neighbour."""
    nearest = NearestNeighbors(n_neighbors=4).fit(others)  # itself and three others
    radius = torch.tensor(nearest.kneighbors(others)[0][:, -1])
    # Not by products of matrices, which put a point at some distance from itself.
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    among = [(distances(part, others) <= radius).any(dim=1) for part in points.split(500)]
    return torch.cat(among).double().mean().item()


if __name__ == "__main__":
    data.run_script(main, "nothing is written; the same command starts over")
