"""Sugar on stories told with icons: teachers, slices, training with and without the structure loss, and what came out."""

import copy
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import CLIPProcessor

from ..data import ExampleDataset, RowParser, TeacherArguments, load_stories, write_slice_features
from ..data.stories import COLOURS, cast_of_icons, describe, draw_story_icon
from ..evaluation.stories import last_picture_recall
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..trainer import UniGDTrainer, UniGDTrainingArguments
from .run import QuickstartArguments, check_in_fresh_process, write_card
from .small_clip import build_clip, save_clip, train_clip
from .small_llava import build_llava, build_processor


IMAGE_SIZE, PATCH_SIZE = 48, 12
CAST = 200
TRAIN_STORIES, TEST_STORIES = 4000, 500
CLIP_STEPS = 500
