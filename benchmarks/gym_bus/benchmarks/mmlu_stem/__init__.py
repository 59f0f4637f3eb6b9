"""MMLU-STEM: multiple-choice questions of the eighteen STEM subjects of MMLU."""
