// The caption review's requests: one opened folder on the server, and the sentences in which it refuses.
import { api } from "../../../scripts/api.js";

const ADDRESS = "/lora_workbench/review";
const CLOSED = 410; // the server was restarted, or has opened many folders since

/** What the server would not do, in its words; `picture` is the caption as it is on the disk now, where it changed. */
export class Refused extends Error {
  constructor(message, status, picture) {
    super(message);
    this.status = status;
    this.picture = picture;
  }
}

export class ReviewApi {
  /** `asked` says what LoRA Dataset Loader reads: folder, trigger_word and sub_folders. */
  constructor(asked) {
    this.asked = asked;
  }

  async open() {
    Object.assign(this, await request(`${ADDRESS}/open`, this.asked)); // token, folder
  }

  /** A GET without a body, a POST with one; opens the folder again where the server has forgotten it. */
  async ask(path, body) {
    try {
      return await request(`${ADDRESS}/${this.token}/${path}`, body);
    } catch (error) {
      if (error.status !== CLOSED) throw error;
      await this.open();
      return await request(`${ADDRESS}/${this.token}/${path}`, body);
    }
  }

  pictureAddress(picture, size) {
    const query = new URLSearchParams({ name: picture.name, size, v: picture.version });
    return api.apiURL(`${ADDRESS}/${this.token}/picture?${query}`);
  }
}

async function request(path, body) {
  const json = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await api.fetchApi(path, body ? json : {});
  } catch {
    throw new Refused("ComfyUI does not answer. Nothing is lost: start it again and go on.", 0);
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  throw new Refused(answer.error ?? `ComfyUI answers with status ${response.status}.`, response.status, answer.picture);
}
