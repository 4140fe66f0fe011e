/* Browsers start no worker from a file, and the search of the site is one: in a page that was opened from a folder,
   its script runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.loaded = new Promise((resolve) => {
        const start = () => {
          const scope = this.frame.contentWindow;
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = scope.document.createElement("script");
          script.src = url;
          script.onload = () => resolve(scope);
          scope.document.body.append(script);
        };
        const attach = () => {
          document.body.append(this.frame);
          start();
        };
        document.body ? attach() : addEventListener("DOMContentLoaded", attach);
      });
    }
    postMessage(data) {
      this.loaded.then((scope) => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
