"""The node ids that files and workflows of other people depend on: none may ever vanish."""

NODE_IDS = (
    "InfiniteIDLoader",
    "InfiniteIDPerson",
    "InfiniteIDFaceModelLoader",
    "InfiniteIDAlignFace",
    "InfiniteIDEncode",
    "InfiniteIDOpenClipLoader",
    "InfiniteIDMix",
    "InfiniteIDSaveIdentity",
    "InfiniteIDLoadIdentity",
    "InfiniteIDAdapterLoader",
    "InfiniteIDApply",
    "InfiniteIDFacePose",
    "InfiniteIDFaceCrop",
    "InfiniteIDFacePaste",
    "InfiniteIDMicroModel",
    "InfiniteIDMicroPortrait",
    "InfiniteIDStylePreset",
    "InfiniteIDScore",
)
