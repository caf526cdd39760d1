// The parts of the gateway's JSON that the dashboard uses. Only the type checker reads this file:
// it is not part of the page. README.rst describes the endpoints and events in full.

/** The data of one event of `GET /debug/stream`, by the event's type. */
export interface EventData {
  inference_start: InferenceStart;
  inference_complete: InferenceComplete;
  model_load_start: ModelName & { loadConfig: object };
  model_load_progress: ModelName & { progress: number };
  model_load_complete: ModelName & { totalTimeMs: number; activated: boolean };
  model_unload_start: ModelName;
  model_unload_complete: ModelName & { totalTimeMs: number };
  model_activate: ModelName & { defaultInference: object };
  model_deactivate: ModelName;
  error: { operation: string; error: string; totalTimeMs?: number };
  host_state: { host: string; state: "up" | "down"; reason?: string };
  gap: { missed: number };
}

/** An event; `type` determines the shape of its data. */
export type GatewayEvent = {
  [Type in keyof EventData]: { type: Type; data: EventData[Type] & { timestamp: string } };
}[keyof EventData];

export interface ModelName {
  modelKey: string;
  instanceId?: string | null;
}

export interface InferenceStart {
  requestId: string;
  method: string;
  path: string;
  model: string;
  stream: boolean;
  client: string;
}

export interface InferenceComplete {
  requestId: string;
  timestamp: string;
  status: number;
  cancelled: boolean;
  totalTimeMs: number;
  ttftMs: number | null;
  tokensPerSec: number | null;
  tokenUsage: { completionTokens: number | null } | null;
}

/** A request or a model load of `GET /debug/status`. */
export type InFlight =
  | (InferenceStart & { operation: "inference"; elapsedMs: number; chunks?: number })
  | (ModelName & { operation: "model_load"; elapsedMs: number });

/** The response of `GET /debug/status`. */
export interface Status {
  inFlight: InFlight[];
  recentRequests?: InferenceComplete[];
  totalRequests: number;
  totalErrors: number;
  error?: string;
}

/** The response of `GET /admin/models`. */
export interface Listing {
  loaded: LoadedModel[];
  downloaded: DownloadedModel[];
  active: (ModelName & { defaultInference?: object | null }) | null;
}

export interface LoadedModel {
  identifier: string;
  modelKey: string;
  type: string;
  contextLength?: number | null;
  ttlMs?: number | null;
}

export interface DownloadedModel {
  modelKey: string;
  type: string;
  displayName?: string | null;
  paramsString?: string | null;
  size?: number | null;
  maxContextLength?: number | null;
}

/** The body of `POST /admin/models/load`. */
export interface LoadRequest {
  modelKey: string;
  instanceId?: string;
  activate: boolean;
  ttlSeconds?: number;
  loadConfig: { contextLength?: number; gpu?: { ratio: number | string } };
}

/** The response of `POST /admin/models/load`. */
export interface Loaded extends ModelName {
  totalTimeMs: number;
  warnings: string[];
}

/** An error body. `error` is an object in the dialect of `/v1`, and a string elsewhere. */
export interface ErrorBody {
  error?: string | { message?: string };
  status?: number;
  details?: { path: (string | number)[]; message: string }[];
}
