document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const line = button.dataset.copy;
  try {
    await navigator.clipboard.writeText(line);
  } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = line;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
});
