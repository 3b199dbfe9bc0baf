"""Measure a run: a Random Forest on its latent codes, and its quality as a generative model."""

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

import data
from model import BATCH, kl_divergence, latent_means, load_model, reconstruction_bce, sample_mixture


def main():
    parser = data.command_line(__doc__)
    parser.add_argument("--baselines", action="store_true", help="also try raw pixels and PCA")
    args = parser.parse_args()
    run = data.read_run(args.run)
    latent_dim = run.settings["latent_dim"]
    model = load_model(run, args.device)
    # Baselines depend on no weights, so those of an earlier classification stay.
    path = run.path / data.CLASSIFICATION
    baselines = data.read(path).get("baselines") if path.exists() else None
    train_images, train_labels = data.load_split(args.data, True, run.settings["hold_out"])
    test_images, test_labels = data.load_split(args.data, False, run.settings["hold_out"])
    components = min(len(train_images), 28 * 28)
    if args.baselines and latent_dim > components:
        raise data.UserError(f"--baselines: PCA has {components} components, not {latent_dim}")

    train_mu = latent_means(model, train_images)
    test_mu = latent_means(model, test_images)
    mixture_z = sample_mixture(train_mu, len(test_mu)).to(args.device)
    merit = figures_of_merit(model, test_images.to(args.device), mixture_z)
    # Of the gap between train and test loss, the difference of the floors is the data's own.
    train_floor = reconstruction_bce(train_images, train_images) / len(train_images)
    merit["train_bce_floor"] = train_floor.item()
    # The criterion for an active unit of Burda, Grosse & Salakhutdinov (2016).
    merit["active_dimensions"] = (test_mu.var(dim=0) > 0.01).sum().item()

    predicted = fit_forest(train_mu, train_labels).predict(test_mu)
    matrix = confusion_matrix(test_labels, predicted, labels=range(len(data.CLASSES)))
    accuracy = matrix.trace() / matrix.sum()
    recall = matrix.diagonal() / matrix.sum(axis=1).clip(min=1)
    print("Confusion matrix: a row a true class, a column a predicted one, in the same order")
    for name, counts, share in zip(data.CLASSES, matrix, recall):
        print(f"{name:11}", *(f"{count:4}" for count in counts), f"{share * 100:6.1f}% right")
    print(f"Classification accuracy: {accuracy * 100:.2f}%")

    if args.baselines:
        # In float64 PCA, like μ, is the same on every machine.
        pixels = [images.flatten(1).double() for images in (train_images, test_images)]
        pca = PCA(latent_dim, random_state=42).fit(pixels[0])
        features = {"pixels": pixels, "pca": [pca.transform(split) for split in pixels]}
        baselines = {}
        for name, (train, test) in features.items():
            baselines[name] = fit_forest(train, train_labels).score(test, test_labels)
            print(f"The same forest on {name}: {baselines[name] * 100:.2f}%")
    for name, value in merit.items():
        print(f"{name}: {value:.4g}")

    found = {"epoch": len(run.log), "sha256": run.sha256, "accuracy": accuracy}
    found |= {"recall": dict(zip(data.CLASSES, recall)), "confusion_matrix": matrix.tolist()}
    data.write(path, {**found, "baselines": baselines, **merit})


def fit_forest(x, y):
    """Return the report's forest fitted to features x [N, D] and labels y [N]."""
    return RandomForestClassifier(n_estimators=100, random_state=42, n_jobs=-1).fit(x, y)


@torch.no_grad()
def figures_of_merit(model, images, mixture_z):
    """Return what tells of reconstructions and samples, for test images [N, 1, 28, 28].

    A reconstruction is the model's forward pass, z sampled, as in the test loss.
    - bce, kld: the two terms of the loss, in nats per image.
    - bce_floor: the BCE of a perfect reconstruction, the entropy of the grey values themselves.
    - excess_bce: bce − bce_floor.
    - mse: squared error per pixel, values in [0, 1].
    - sharpness_reconstructions, sharpness_samples, sharpness_mixture_samples: gradient energy of N
      reconstructions, N samples z ~ N(0, I), and of `mixture_z` decoded, over that of the images.
    """
    torch.manual_seed(0)
    outputs = zip(*(model(x) for x in images.split(BATCH)))
    reconstructions, mu, logvar = (torch.cat(parts) for parts in outputs)
    samples = torch.cat([model.decode(z) for z in torch.randn_like(mu).split(BATCH)])
    mixture_samples = torch.cat([model.decode(z) for z in mixture_z.split(BATCH)])
    bce = reconstruction_bce(reconstructions, images).item() / len(images)
    bce_floor = reconstruction_bce(images, images).item() / len(images)
    energy = gradient_energy(images)
    return {
        "bce": bce,
        "kld": kl_divergence(mu, logvar).item() / len(images),
        "bce_floor": bce_floor,
        "excess_bce": bce - bce_floor,
        "mse": F.mse_loss(reconstructions, images).item(),
        "sharpness_reconstructions": gradient_energy(reconstructions) / energy,
        "sharpness_samples": gradient_energy(samples) / energy,
        "sharpness_mixture_samples": gradient_energy(mixture_samples) / energy,
    }


def gradient_energy(images):
    """Return the mean over images of Σ (∂x)² + (∂y)², differences of neighbouring pixels.

    A measure of focus (Subbarao, Choi & Nikzad, 1993): blur lowers it.
    """
    dy, dx = images.diff(dim=2), images.diff(dim=3)
    return (dy.square().sum() + dx.square().sum()).item() / len(images)


if __name__ == "__main__":
    data.run_script(main, "nothing is written; the same command starts over")
