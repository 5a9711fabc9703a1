// Browsers start no worker for a page that was opened from disk. The site's search is a worker.
// Here its script runs in a hidden frame. Material's own stand-in lies on a server.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.ready = new Promise((resolve) => {
        const frame = document.createElement("iframe")
        frame.hidden = true
        frame.onload = () => {
          const inside = frame.contentWindow
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = inside.document.createElement("script")
          script.src = new URL(url, document.baseURI)
          script.onload = () => resolve(inside)
          inside.document.body.append(script)
        }
        document.body.append(frame)
      })
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
