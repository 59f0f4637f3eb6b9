"""The official client against a model that `gym-bus model serve` offers, in both API forms.

python openai_client.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none")
response = client.responses.create(model="simulated", input="What is 2 + 2?", max_output_tokens=64)
print("responses:", response.output_text[-60:])
chat = client.chat.completions.create(model="simulated", messages=[{"role": "user", "content": "What is 2 + 2?"}])
print("chat:", (chat.choices[0].message.content or "")[-60:])
