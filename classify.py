"""Measure a run: a Random Forest on its latent codes, and its quality as a generative model."""

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

import data
from model import kl_divergence, load_model, reconstruction_bce

BATCH = 128


def main():
    parser = data.command_line(__doc__)
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also fit the forest on raw pixels and on PCA of as many dimensions",
    )
    args = parser.parse_args()
    run = args.run
    settings, _ = data.read_run(run)
    model = load_model(run / data.WEIGHTS, args.device)
    baselines = None
    if (
        run / data.CLASSIFICATION
    ).exists():  # earlier ones stay: no weights are in them
        baselines = data.read_json(run / data.CLASSIFICATION, ["baselines"])[
            "baselines"
        ]
    train_images, train_labels = data.load_split(args.data, train=True)
    test_images, test_labels = data.load_split(args.data, train=False)

    metrics = figures_of_merit(model, test_images.to(args.device))
    train_mu, test_mu = (
        latent_means(model, train_images),
        latent_means(model, test_images),
    )
    metrics["active_dimensions"] = active_dimensions(test_mu)
    matrix = confusion_matrix(
        test_labels,
        fit_forest(train_mu, train_labels).predict(test_mu),
        labels=range(len(data.CLASSES)),
    )
    accuracy = matrix.trace() / matrix.sum()
    recall = matrix.diagonal() / matrix.sum(axis=1).clip(min=1)
    print_matrix(matrix, recall)
    print(f"Classification accuracy: {accuracy * 100:.2f}%")

    if args.baselines:
        # In float64 PCA, like μ, is the same on every machine.
        train_pixels = train_images.flatten(1).double()
        test_pixels = test_images.flatten(1).double()
        pca = PCA(settings["latent_dim"], random_state=42).fit(train_pixels)
        features = {
            "pixels": (train_pixels, test_pixels),
            "pca": (pca.transform(train_pixels), pca.transform(test_pixels)),
        }
        baselines = {}
        for name, (train, test) in features.items():
            baselines[name] = fit_forest(train, train_labels).score(test, test_labels)
            print(f"The same forest on {name}: {baselines[name] * 100:.2f}%")
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")

    classification = {
        "accuracy": accuracy,
        "recall": dict(zip(data.CLASSES, recall)),
        "confusion_matrix": matrix.tolist(),
        "baselines": baselines,
        "settings": settings,
    }
    data.write_files(
        {
            run / data.CLASSIFICATION: data.json_bytes(classification),
            run / data.METRICS: data.json_bytes(metrics),
        }
    )


def fit_forest(features, labels):
    """Return the report's forest fitted to features [N, D] and labels [N]."""
    forest = RandomForestClassifier(n_estimators=100, random_state=42, n_jobs=-1)
    return forest.fit(features, labels)


@torch.no_grad()
def latent_means(model, images):
    """Return μ(x), [N, latent_dim] float32, on the CPU.

    It is computed in float64, so that rounding, and with it the forest, is the same on every
    machine. (Apple's mps has no float64; the CPU then computes it.)
    """
    if next(model.parameters()).device.type == "mps":
        model = model.cpu()
    model.double()
    parameter = next(model.parameters())
    mu = [model.encode(x.to(parameter))[0].float().cpu() for x in images.split(BATCH)]
    model.float()
    return torch.cat(mu)


@torch.no_grad()
def figures_of_merit(model, images):
    """Return what tells of reconstructions and samples, for test images [N, 1, 28, 28].

    A reconstruction is the model's forward pass, z sampled, as in the test loss.
    - bce, kld: the two terms of the loss, in nats per image.
    - bce_floor: the BCE of a perfect reconstruction, the entropy of the grey values themselves.
    - excess_bce: bce − bce_floor.
    - mse: squared error per pixel, values in [0, 1].
    - sharpness_reconstructions, sharpness_samples: gradient energy of N reconstructions, and
      of N samples z ~ N(0, I), over that of the images; 1 is as sharp as they are.
    """
    torch.manual_seed(0)
    outputs = zip(*(model(x) for x in images.split(BATCH)))
    reconstructions, mu, logvar = (torch.cat(parts) for parts in outputs)
    samples = torch.cat([model.decode(z) for z in torch.randn_like(mu).split(BATCH)])
    bce = reconstruction_bce(reconstructions, images).item() / len(images)
    bce_floor = reconstruction_bce(images, images).item() / len(images)
    return {
        "bce": bce,
        "kld": kl_divergence(mu, logvar).item() / len(images),
        "bce_floor": bce_floor,
        "excess_bce": bce - bce_floor,
        "mse": F.mse_loss(reconstructions, images).item(),
        "sharpness_reconstructions": gradient_energy(reconstructions)
        / gradient_energy(images),
        "sharpness_samples": gradient_energy(samples) / gradient_energy(images),
    }


def gradient_energy(images):
    """Return the mean over images of Σ (∂x)² + (∂y)², differences of neighbouring pixels.

    A measure of focus (Subbarao, Choi & Nikzad, 1993): blur lowers it.
    """
    dy, dx = images.diff(dim=2), images.diff(dim=3)
    return (dy.square().sum() + dx.square().sum()).item() / len(images)


def active_dimensions(mu):
    """Return how many columns of mu [N, latent_dim] vary by more than 0.01 over the images.

    The criterion for an active unit of Burda, Grosse & Salakhutdinov (2016).
    """
    return (mu.var(dim=0) > 0.01).sum().item()


def print_matrix(matrix, recall):
    """Print the confusion matrix, rows true and columns predicted, with totals and recall."""
    width = max(map(len, data.CLASSES))
    print(
        f"{'true / predicted':{width}}",
        *(f"{name[:6]:>6}" for name in data.CLASSES),
        end="",
    )
    print("   true recall")
    for name, row, share in zip(data.CLASSES, matrix, recall):
        print(f"{name:{width}}", *(f"{count:6}" for count in row), end="")
        print(f" {row.sum():6} {share * 100:5.1f}%")


if __name__ == "__main__":
    data.run_script(main)
