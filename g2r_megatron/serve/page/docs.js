// Draws openapi.json: each route with its texts, each object with its fields.
"use strict";

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items || {})}`;
  return schema.type || "anything";
}

function drawRoute(path, method, route) {
  const body = route.requestBody ? typeOf(route.requestBody.content["application/json"].schema) : "nothing";
  const answers = Object.entries(route.responses).map(([status, answer]) => {
    const schema = answer.content && answer.content["application/json"] && answer.content["application/json"].schema;
    return `${status}: ${schema && schema.$ref ? typeOf(schema) + ", " : ""}${answer.description}`;
  });
  return [
    element("dt", `${method.toUpperCase()} ${path}`),
    element("dd", route.description || route.summary || ""),
    element("dd", `takes ${body}`),
    element("pre", answers.join("\n")),
  ];
}

function drawObject(name, schema) {
  const required = new Set(schema.required || []);
  const fields = Object.entries(schema.properties || {}).map(
    ([field, value]) => `${field}: ${typeOf(value)}${required.has(field) ? "" : " (optional)"}`,
  );
  return [element("dt", name), element("dd", schema.description || ""), element("pre", fields.join("\n"))];
}

async function main() {
  const found = await (await fetch("openapi.json")).json();
  for (const [path, methods] of Object.entries(found.paths)) {
    for (const [method, route] of Object.entries(methods)) document.getElementById("routes").append(...drawRoute(path, method, route));
  }
  for (const [name, schema] of Object.entries(found.components.schemas)) {
    document.getElementById("objects").append(...drawObject(name, schema));
  }
}

main();
